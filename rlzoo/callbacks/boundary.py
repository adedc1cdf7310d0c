"""The seam between rollout steps, where everything is whole: weights, outputs, state.

Callbacks that act there run in the order of their list: weight sync, validation, log, checkpoint.
"""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from rlzoo.types import RolloutBatch


class BoundaryCallback(Callback):
    """Calls `on_boundary` after the last microbatch of each rollout step."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        if batch.last:
            self.on_boundary(trainer, pl_module)

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise NotImplementedError
