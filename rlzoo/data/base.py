from __future__ import annotations

import lightning

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
        self._stop: tuple[int, str | None] = (-1, None)

    def stop_reason(self) -> str | None:
        """The limit that ends the run at this boundary; asked once, so that all callbacks agree."""
        if self._stop[0] != self.rollout_step:
            self._stop = (self.rollout_step, self.ledger.exceeded(self.limits))
        return self._stop[1]
