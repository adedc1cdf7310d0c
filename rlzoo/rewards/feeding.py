"""Hands responses to the reward as they finish, so that little is left to wait for at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from rlzoo.rewards.base import Scores
from rlzoo.rewards.calling import RewardCaller
from rlzoo.types import Prompt

# How long responses gather before they are scored together: a call has a price, and what the thread
# spends is the engine's loss. Nothing gathers any more once the last one is there.
_GATHER_SECONDS = 0.25
_LOOK_SECONDS = 0.05  # between two looks at how far the thread has come, for the progress bar
_Finished = tuple[int, Tensor, bool]  # place, token ids, truncated


class Feeder:
    """Decodes and scores responses in a thread of its own while others are still being drawn.

    A reward that scores each response by itself (`RewardCaller.by_response`) is called in that
    thread, again and again, with whatever has finished meanwhile. Any other is called once, in the
    thread that asks for the scores, with all responses in order. Which responses share a call
    depends on the clock; what they are worth does not.

    Use it as a context manager: the thread ends with it, however it is left.

    Args:
        reward: scores the responses.
        decode: token ids to text.
        prompts: [N] of the responses to come, in the order of their places.
        golds_to_try: prompts whose gold answers are looked at first.
    """

    def __init__(
        self,
        reward: RewardCaller,
        decode: Callable[[Tensor], str],
        prompts: Sequence[Prompt],
        golds_to_try: Sequence[Prompt] = (),
    ) -> None:
        self.reward, self.decode, self.prompts = reward, decode, prompts
        self.golds_to_try = golds_to_try
        self.texts, self.truncated = [""] * len(prompts), [False] * len(prompts)
        self.rewards = torch.zeros(len(prompts))
        self.verdicts = torch.zeros(len(prompts), dtype=torch.int8)
        self.unparsed_golds: list[str] = []  # ids of prompts, one a response
        self.num_given = self.num_known = 0  # responses handed over, and scored
        self._finished: SimpleQueue[_Finished | None] = SimpleQueue()  # None: no more will come
        self._problem: BaseException | None = None
        self._ended = threading.Event()
        self._abandoned = False
        self._thread = threading.Thread(target=self._work, name="rlzoo-reward", daemon=True)

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._abandoned = True
        self._end()
        self._thread.join()

    def add(self, place: int, token_ids: Tensor, truncated: bool) -> None:
        """Takes a response that has finished.

        Raises:
            Exception: what the reward raised meanwhile, so that nothing is drawn in vain.
        """
        if self._problem is not None:
            raise self._problem
        self.num_given += 1
        self._finished.put((place, token_ids, truncated))

    def scores(self, advance: Callable[[int], None] = lambda n: None) -> Scores:
        """The scores of all responses in the order of their places; waits for those not known yet.

        Args:
            advance: called with the number of those newly scored.

        Raises:
            Exception: what the reward raised.
            RuntimeError: responses are missing.
        """
        self._end()
        told, is_working = 0, True
        while is_working:
            self._thread.join(_LOOK_SECONDS)
            is_working, known = self._thread.is_alive(), self.num_known
            if known > told:
                advance(known - told)
                told = known
        if self._problem is not None:
            raise self._problem
        if self.num_given != len(self.prompts):
            raise RuntimeError(
                f"The engine told of {self.num_given} responses of {len(self.prompts)}: its"
                " generate() must call on_response once for each (rlzoo.engines.base.Engine)."
            )
        if not self.reward.by_response:
            self._score(range(len(self.prompts)), increments(advance))
        return Scores(self.rewards, self.verdicts)

    def _work(self) -> None:
        try:
            self.reward.check_golds(self.golds_to_try)
            while (fresh := self._fresh()) and not self._abandoned:
                for place, token_ids, truncated in fresh:
                    self.texts[place] = self.decode(token_ids)
                    self.truncated[place] = truncated
                if self.reward.by_response:
                    self._score([place for place, *_ in fresh], increments(self._know))
        except BaseException as error:  # for the thread that draws to raise
            self._problem = error

    def _fresh(self) -> list[_Finished]:
        """All that has finished meanwhile; waits for one, and has none when no more will come."""
        fresh: list[_Finished] = []
        item = self._finished.get()
        self._ended.wait(_GATHER_SECONDS)
        while item is not None:
            fresh.append(item)
            try:
                item = self._finished.get_nowait()
            except Empty:
                return fresh
        self._finished.put(None)  # for the next call to see
        return fresh

    def _end(self) -> None:
        self._ended.set()
        self._finished.put(None)

    def _know(self, number: int) -> None:
        self.num_known += number

    def _score(self, places: Sequence[int], on_progress: Callable[[int], None]) -> None:
        scores = self.reward(
            [self.prompts[i] for i in places],
            [self.texts[i] for i in places],
            [self.truncated[i] for i in places],
            on_progress,
        )
        at = torch.tensor(places, dtype=torch.long)
        self.rewards[at], self.verdicts[at] = scores.rewards, scores.verdicts
        self.unparsed_golds += self.reward.unparsed_golds


def increments(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Turns a call with the number done so far into calls with the number newly done."""
    last = 0

    def on_progress(done: int) -> None:
        nonlocal last
        advance(done - last)
        last = done

    return on_progress
