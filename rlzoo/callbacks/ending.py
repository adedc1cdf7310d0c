from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback
from rlzoo.errors import UserError
from rlzoo.models.finite import not_finite
from rlzoo.ranks.exchange import all_gather


class Ending(BoundaryCallback):
    """Ends the run at the boundary that reaches a limit, and at one after which the weights are no
    numbers. Stands first, so that all that follow know of the end; no configuration leaves it out.

    Args:
        begun: called once training begins, when nothing of what was asked for was refused.
    """

    def __init__(self, begun: Callable[[], None] | None = None) -> None:
        self.begun = begun

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.begun is not None:
            self.begun()

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises a UserError if a parameter holds NaN or inf, before it is saved or sampled from."""
        broken = [name for name in all_gather(not_finite(pl_module.named_parameters())) if name]
        if broken:
            raise UserError(
                f"After update {trainer.datamodule.ledger.updates} {broken[0]} holds NaN or inf, so"
                " there is no policy any more. What was saved before stands: go on from it with a"
                " lower lr, or with wider numbers: model.dtype=float32."
            )
        if trainer.datamodule.stop_reason() is not None:
            trainer.should_stop = True


class Postponed(Callback):
    """Makes `trainer.should_stop`, set by any callback, end the run at the next boundary, where
    weights, log and checkpoint belong together. Stands last."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        data = trainer.datamodule
        if trainer.should_stop and data.ended_by is None:
            trainer.should_stop, data.asked_to_stop = False, True
