"""What a run is while it lives. The loop hands it to each of its parts."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from rlzoo.data.ahead import Ahead
from rlzoo.data.draw import Drawer
from rlzoo.engines.base import Engine
from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather
from rlzoo.report.ledger import Ledger, Limits
from rlzoo.report.progress import Bars
from rlzoo.types import Rollouts


class Cursor(Protocol):
    """Where a run stands in its data: what every DataModule of rlzoo says of itself."""

    rollout_step: int  # steps begun; for supervised training, blocks of updates

    @property
    def epochs_done(self) -> int: ...

    def exhausted(self) -> str | None:
        """Why there is nothing left to train on; None as long as there is."""


class Run:
    """What has been spent, what draws, what is written next, and what ends it.

    Args:
        limits: stop rules.
        ledger: what has been spent.
        bars: progress bars and step lines.
        drawer: engine and reward; None of supervised training, which draws nothing.
        record: what the run's checkpoints say of its configuration, see `rlzoo.launch.resuming`.
        exact: False where a resume starts the optimizer anew, so that more may differ.

    Attributes:
        rollouts: those of the rollout step in training.
        draws_ahead: whether the next is drawn meanwhile (`pipeline=one_step`).
        row: figures that the row of the step in progress will hold; any part adds to it.
        last_row: the row written last, on rank 0.
        told_to_stop: the signal that this rank was sent.
        asked_to_stop: some callback has set `trainer.should_stop`; the next boundary ends the run.
        ended_by: the limit that ended the run, once it has ended.
    """

    def __init__(
        self,
        limits: Limits,
        ledger: Ledger,
        bars: Bars,
        drawer: Drawer | None = None,
        record: dict[str, Any] | None = None,
        exact: bool = True,
    ) -> None:
        self.limits, self.ledger, self.bars, self._drawer = limits, ledger, bars, drawer
        self.record, self.exact = record or {}, exact
        self.rollouts: Rollouts | None = None
        self.row: dict[str, float] = {}
        self.last_row: dict[str, float] = {}
        self._ahead = None if drawer is None else Ahead(drawer)
        self.draws_ahead = False
        self.told_to_stop: str | None = None
        self.asked_to_stop = False
        self.ended_by: str | None = None

    @property
    def drawer(self) -> Drawer:
        assert self._drawer is not None, "supervised training draws nothing"
        return self._drawer

    @property
    def ahead(self) -> Ahead:
        assert self._ahead is not None, "supervised training draws nothing"
        return self._ahead

    @property
    def engine(self) -> Engine:
        return self.drawer.engine

    def endless(self, max_epochs: int | None) -> bool:
        """Whether no limit will ever end the run."""
        return max_epochs in (None, -1) and all(x is None for x in vars(self.limits).values())

    def settle_end(self, cursor: Cursor, max_epochs: int | None) -> None:
        """Agrees on whether the run ends at this boundary; `ended_by` says by what.

        Collective: clocks differ, and rank 0's counts.
        """
        found = all_gather((self.limit_met(cursor, max_epochs), self.asked_to_stop))
        asked = "trainer.should_stop" if any(asked for _, asked in found) else None
        self.ended_by = found[0][0] or asked

    def goes_on(self, updates: int) -> bool:
        """Whether another rollout step follows the one in training, as far as counts can tell: of
        clocks and signals nobody knows.

        Args:
            updates: those that are left to make of the one in training.
        """
        most = self.limits.max_updates
        left = None if most is None else most - updates
        counted = dataclasses.replace(self.limits, max_seconds=None, max_updates=left)
        return self.ledger.exceeded(counted) is None

    def limit_met(self, cursor: Cursor, max_epochs: int | None) -> str | None:
        """The limit that this rank has reached."""
        limit = self.ledger.exceeded(self.limits)
        if limit is None and max_epochs is not None and 0 <= max_epochs <= cursor.epochs_done:
            limit = f"trainer.max_epochs={max_epochs}"
        return limit or cursor.exhausted()

    def preempted(self) -> str | None:
        """The signal that any rank was sent; collective."""
        return next((signal for signal in all_gather(self.told_to_stop) if signal), None)

    def close(self) -> None:
        """Ends the engine and the reward's workers."""
        if self._drawer is not None:
            self._drawer.reward.close()
            self._drawer.engine.close()

    @property
    def drawn_by(self) -> str | None:
        return None if self._drawer is None else type(self.engine).__name__

    def state_dict(self) -> dict[str, Any]:
        ahead = None if self._ahead is None else self._ahead.state_dict()  # may end a draw: first
        lengths = {} if self._drawer is None else self.drawer.lengths.sums
        return {
            "ahead": ahead,
            "ledger": self.ledger.state_dict(),
            "record": self.record,
            "drawn_by": self.drawn_by,
            "lengths": dict(lengths),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `rlzoo.models.checkpoints.run_state` found.

        Raises:
            UserError: another engine would draw, and the run is to go on exactly.
        """
        before, now = state["drawn_by"], self.drawn_by
        if self.exact and before is not None and before != now:
            raise UserError(
                f"The run cannot go on from its checkpoint: {before} drew its responses, now {now}"
                " would. Give what it was begun with, or start a new run_dir from its weights:"
                " init_from=CHECKPOINT."
            )
        self.ledger.load_state_dict(state["ledger"])
        if self._drawer is not None:
            self.drawer.lengths.sums = dict(state.get("lengths", {}))  # older checkpoints have none
        if self._ahead is not None:
            self._ahead.load_state_dict(state.get("ahead"))  # older checkpoints have none
