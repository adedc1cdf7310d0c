from __future__ import annotations

import lightning

from rlzoo.distributed import all_gather
from rlzoo.ledger import Ledger, Limits
from rlzoo.progress import Bars


class RunDataModule(lightning.LightningDataModule):
    """What every run's data keeps for the callbacks that act between its steps.

    Attributes:
        ledger: what has been spent.
        bars: progress bars and step lines.
        row: figures that the row of the step in progress will hold; callbacks add to it.
        last_row: the row written last.
        rollout_step: steps begun in the run; for supervised training, blocks of updates.
    """

    def __init__(self, bars: Bars, limits: Limits) -> None:
        super().__init__()
        self.bars, self.limits, self.ledger = bars, limits, Ledger()
        self.row: dict[str, float] = {}
        self.last_row: dict[str, float] = {}
        self.rollout_step = 0
        self.told_to_stop: str | None = None  # the signal that this rank was sent
        self._stop: tuple[int, str | None] = (-1, None)
        self._preempted: tuple[int, str | None] = (-1, None)

    def stop_reason(self) -> str | None:
        """The limit that ends the run at this boundary; asked once, so that all callbacks agree.

        Collective at its first call in a rollout step: clocks differ, and rank 0's counts.
        """
        if self._stop[0] != self.rollout_step:
            self._stop = (self.rollout_step, all_gather(self.limit_met())[0])
        return self._stop[1]

    def limit_met(self) -> str | None:
        """The limit that this rank has reached."""
        return self.ledger.exceeded(self.limits)

    def preempted(self) -> str | None:
        """The signal that any rank was sent; collective, once in a rollout step, as above."""
        if self._preempted[0] != self.rollout_step:
            told = [signal for signal in all_gather(self.told_to_stop) if signal]
            self._preempted = (self.rollout_step, told[0] if told else None)
        return self._preempted[1]
