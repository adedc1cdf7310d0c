from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning import LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback
from rlzoo.types import RolloutBatch


class TrainingPhase(BoundaryCallback):
    """Books the seconds of training and shows its bar; stands first, so that it ends first."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._advance = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        data = trainer.datamodule
        if self._advance is None:
            total = data.microbatches_per_step
            self._open.enter_context(data.ledger.phase("training"))
            bar = data.bars.phase("training", total, "microbatches")
            self._advance = self._open.enter_context(bar)

    def on_train_batch_end(self, *args: Any) -> None:
        self._advance(1)
        super().on_train_batch_end(*args)

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()
        self._advance = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._open.close()
