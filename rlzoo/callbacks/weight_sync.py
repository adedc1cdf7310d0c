from __future__ import annotations

from typing import Literal

import torch
from lightning import LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback
from rlzoo.engines.base import weights_checksum
from rlzoo.engines.probe import HALF_GAP, in_half_precision, probe_sequences, trainer_scores
from rlzoo.errors import check_choice
from rlzoo.values import Positive

STALE = (
    "After a weight sync the engine's weights differ from the trainer's: it would sample from another"
    " policy than the one being trained."
)


class WeightSync(BoundaryCallback):
    """Hands the trainer's weights to the engine, in memory, with their version.

    Args:
        check: when the engine's weights are compared with the trainer's: "first" (at start),
            "always" or "never". By checksum, or, where an engine packs its weights so that they
            cannot be read back, by the log-probs of a probe.
        probe_tolerance: mean |trainer - engine| log-prob of the probe's tokens that passes, nats;
            null is 1e-3 where both compute in float32, and 0.3 in half precision.
    """

    def __init__(
        self,
        check: Literal["first", "always", "never"] = "first",
        probe_tolerance: Positive | None = None,
    ) -> None:
        check_choice("callbacks.weight_sync.check", check, ("first", "always", "never"))
        self.check, self.probe_tolerance = check, probe_tolerance

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        with data.ledger.phase("engine_start"), data.bars.phase("starting the engine", 1, "engines"):
            data.engine.wake()
        self.sync(trainer, pl_module, check=self.check != "never")

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sync(trainer, pl_module, check=self.check == "always")

    def sync(self, trainer: Trainer, pl_module: LightningModule, check: bool) -> None:
        """Pushes the weights; the engine is awake afterwards.

        Raises:
            RuntimeError: the engine's weights are not the trainer's.
        """
        ledger, engine = trainer.datamodule.ledger, trainer.datamodule.engine
        with ledger.phase("weight_sync"):
            engine.wake()
            engine.load_weights(pl_module.named_weights(), ledger.updates)
            if check:
                self.compare(trainer, pl_module)

    def compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine = trainer.datamodule.engine
        checksum = engine.checksum()
        if checksum is not None:
            held = getattr(torch, engine.dtype)  # the trainer's may be finer, or coarser
            if checksum != weights_checksum(pl_module.named_weights(), held):
                raise RuntimeError(STALE)
            return
        sequences = probe_sequences(pl_module.policy)
        expected = trainer_scores(pl_module.policy, sequences, pl_module.device)
        gap = float((torch.cat(engine.score(sequences)) - torch.cat(expected)).abs().mean())
        tolerance = self.probe_tolerance
        if tolerance is None:
            tolerance = HALF_GAP if in_half_precision(trainer.precision, engine.dtype) else 1e-3
        if not gap <= tolerance:
            raise RuntimeError(
                f"{STALE} On a probe their log-probs differ by {gap:.3g} nats a token, over"
                f" callbacks.weight_sync.probe_tolerance={tolerance}."
            )
