"""The rollout step that is drawn while the one before it is trained on (`pipeline=one_step`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import fields
from typing import Any, TypeVar

from rlzoo.data.draw import Drawer, Order, Share
from rlzoo.errors import UserError
from rlzoo.types import Prompt, Rollouts

AHEAD = "ahead"  # the stream under which it is booked until it is trained on

T = TypeVar("T")


class Ahead:
    """At most one rollout step that is being drawn, or has been, and waits for its training.

    A rank draws and scores its share in a thread. Ranks exchange what they drew in `complete`, on
    the main thread, where all of them come in the same order.
    """

    def __init__(self, drawer: Drawer) -> None:
        self.drawer = drawer
        self._begun: tuple[Order, Future[Share]] | None = None
        self._drawn: Rollouts | None = None
        self._saved: dict[str, Any] | None = None  # of a checkpoint, as `state_dict` gave it

    def begin(self, prompts: list[Prompt], budgets: list[int], rollout_step: int) -> None:
        """Begins to draw with the weights that the engine holds; they must stay till `complete`."""
        order = self.drawer.order(prompts, budgets, "train", rollout_step)._replace(stream=AHEAD)
        self._begun = order, in_background(lambda: self.drawer.sample(order, beside=True))

    def complete(self) -> None:
        """Waits until all is drawn and scored; collective. Books it as drawn ahead."""
        if self._begun is None:
            return
        (order, share), self._begun = self._begun, None
        with self.drawer.ledger.phase(f"waiting/{AHEAD}"):
            mine = share.result()
        self._drawn = self.drawer.gather(order, mine)

    def take(self, prompts: Sequence[Prompt], corrected: bool) -> Rollouts | None:
        """What was drawn, to be trained on now; None if nothing was.

        Args:
            prompts: those of training, among which a checkpoint's are looked up.
            corrected: whether what an older policy drew is weighed for it.

        Raises:
            UserError: it would not be.
        """
        if self._saved is not None:
            self._drawn, self._saved = restored(self._saved, prompts), None
        rollouts, self._drawn = self._drawn, None
        if rollouts is not None:
            ledger = self.drawer.ledger
            ledger.moved(AHEAD, "train", rollouts.lengths.tolist())
            rollouts.lag = ledger.updates - rollouts.policy_version
            if rollouts.lag and not corrected:
                raise UserError(
                    f"The checkpoint holds a rollout step that was drawn {rollouts.lag} updates ago"
                    " (pipeline=one_step), and algo.tis_cap=null would train on it as if it were"
                    " the policy's own. Set algo.tis_cap=2.0."
                )
        return rollouts

    def state_dict(self) -> dict[str, Any] | None:
        """What is drawn and not trained on, in types that a checkpoint may hold."""
        self.complete()
        if self._drawn is None:
            return self._saved
        state = {field.name: getattr(self._drawn, field.name) for field in fields(Rollouts)}
        return state | {"prompts": [prompt.id for prompt in self._drawn.prompts]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._saved = state


def restored(state: dict[str, Any], prompts: Sequence[Prompt]) -> Rollouts:
    wanted = set(state["prompts"])
    found = {prompt.id: prompt for prompt in prompts if prompt.id in wanted}
    return Rollouts(**state | {"prompts": [found[i] for i in state["prompts"]]})


def in_background(call: Callable[[], T]) -> Future[T]:
    """What a call in a thread of its own will return, or raise. The thread ends with the process,
    whether it has come to its end or not."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # for whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=work, name="rlzoo-ahead", daemon=True).start()
    return future
