from __future__ import annotations

from lightning import LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback
from rlzoo.engines.base import weights_checksum
from rlzoo.errors import check_choice


class WeightSync(BoundaryCallback):
    """Hands the trainer's weights to the engine, in memory, with their version.

    Args:
        check: when the engine's checksum is compared with the trainer's: "first" (at start),
            "always" or "never".
    """

    def __init__(self, check: str = "first") -> None:
        check_choice("callbacks.weight_sync.check", check, ("first", "always", "never"))
        self.check = check

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sync(trainer, pl_module, check=self.check != "never")

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sync(trainer, pl_module, check=self.check == "always")

    def sync(self, trainer: Trainer, pl_module: LightningModule, check: bool) -> None:
        """Pushes the weights; the engine is awake afterwards.

        Raises:
            RuntimeError: the engine's checksum differs from the trainer's.
        """
        ledger, engine = trainer.datamodule.ledger, trainer.datamodule.engine
        with ledger.phase("weight_sync"):
            engine.wake()
            engine.load_weights(pl_module.named_weights(), ledger.updates)
            if check and engine.checksum() != weights_checksum(pl_module.named_weights()):
                raise RuntimeError(
                    "After a weight sync the engine's weights differ from the trainer's: it would"
                    " sample from another policy than the one being trained."
                )
