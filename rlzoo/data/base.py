from __future__ import annotations

from typing import Any

import lightning

from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather
from rlzoo.report.ledger import Ledger, Limits
from rlzoo.report.progress import Bars


class RunDataModule(lightning.LightningDataModule):
    """What every run's data keeps for the callbacks that act between its steps.

    Attributes:
        ledger: what has been spent.
        bars: progress bars and step lines.
        row: figures that the row of the step in progress will hold; callbacks add to it.
        last_row: the row written last.
        rollout_step: steps begun in the run; for supervised training, blocks of updates.
        record: what the run's checkpoints say of its configuration, see `rlzoo.launch.resuming`.
        exact: False where a resume starts the optimizer anew, so that more may differ.
        asked_to_stop: a callback has set `trainer.should_stop`; the next boundary ends the run.
        ended_by: what ended the run, once it has ended; nobody is asked for it.
    """

    def __init__(self, bars: Bars, limits: Limits) -> None:
        super().__init__()
        self.bars, self.limits, self.ledger = bars, limits, Ledger()
        self.row: dict[str, float] = {}
        self.last_row: dict[str, float] = {}
        self.rollout_step = 0
        self.told_to_stop: str | None = None  # the signal that this rank was sent
        self.record: dict[str, Any] = {}
        self.exact, self.asked_to_stop = True, False
        self._stop: tuple[int, str | None] = (-1, None)
        self._preempted: tuple[int, str | None] = (-1, None)

    @property
    def epochs_done(self) -> int:
        return self.rollout_step

    @property
    def ended_by(self) -> str | None:
        return self._stop[1]

    def end(self, reason: str) -> None:
        """Makes this the end, for that reason."""
        self._stop = (self.rollout_step, reason)

    def stop_reason(self) -> str | None:
        """The limit that ends the run at this boundary; asked once, so that all callbacks agree.

        Collective at its first call in a rollout step: clocks differ, and rank 0's counts.
        """
        if self._stop[0] != self.rollout_step:
            found = all_gather((self.limit_met(), self.asked_to_stop))
            asked = "trainer.should_stop" if any(asked for _, asked in found) else None
            self._stop = (self.rollout_step, found[0][0] or asked)
        return self._stop[1]

    def limit_met(self) -> str | None:
        """The limit that this rank has reached."""
        limit = self.ledger.exceeded(self.limits)
        epochs = getattr(self.trainer, "max_epochs", None)
        if limit is None and epochs is not None and 0 <= epochs <= self.epochs_done:
            return f"trainer.max_epochs={epochs}"
        return limit

    def preempted(self) -> str | None:
        """The signal that any rank was sent; collective, once in a rollout step, as above."""
        if self._preempted[0] != self.rollout_step:
            told = [signal for signal in all_gather(self.told_to_stop) if signal]
            self._preempted = (self.rollout_step, told[0] if told else None)
        return self._preempted[1]

    def run_state(self) -> dict[str, Any]:
        """What every run's checkpoints hold of its data."""
        return {
            "rollout_step": self.rollout_step,
            "ledger": self.ledger.state_dict(),
            "record": self.record,
            "fingerprint": self.fingerprint(),
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `run_state` said.

        Raises:
            UserError: the data are not those that the run began with.
        """
        before = state.get("fingerprint")  # older checkpoints have none
        faults = self.data_changes(before, self.fingerprint()) if before else []
        if faults:
            raise UserError(
                f"The run cannot go on from its checkpoint: {'; '.join(faults)}. Give what it was"
                " begun with, or start a new run_dir from its weights: init_from=CHECKPOINT."
            )
        self.rollout_step = state["rollout_step"]
        self.ledger.load_state_dict(state["ledger"])

    def fingerprint(self) -> dict[str, Any]:
        """What tells this run's data from another's; known once `setup` has been called."""
        return {}

    def data_changes(self, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """In what two fingerprints differ, that must not."""
        return []
