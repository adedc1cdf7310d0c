from __future__ import annotations

import math
from typing import Literal

import torch
from lightning import LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback
from rlzoo.diagnosis.causes import on_probe
from rlzoo.diagnosis.suspects import probe, setting_of
from rlzoo.engines.base import weights_checksum
from rlzoo.errors import UserError, check_choice
from rlzoo.models.finite import broken_weights
from rlzoo.ranks.exchange import all_gather
from rlzoo.values import Positive

CHECKED = 2  # syncs that check=first compares: at start, and after the engine's first sleep
OTHERWISE = "After a weight sync engine and trainer do not agree."
STALE = (
    "After a weight sync the engine's weights differ from the trainer's: it would sample from another"
    " policy than the one being trained."
)


class WeightSync(BoundaryCallback):
    """Hands the trainer's weights to the engine, in memory, with their version.

    Args:
        check: when the engine's weights are compared with the trainer's: "first" (at the first two
            syncs: at start, and once the engine has slept in between), "always" or "never". By
            checksum, or, where an engine packs its weights so that they cannot be read back, by
            the log-probs of a probe.
        probe_tolerance: mean |trainer - engine| log-prob of the probe's tokens that passes, nats;
            null is 1e-3 where both hold float32, and 0.1 in half precision, or what that alone does to
            this model's probe, thrice, if it can be measured and is more.
    """

    def __init__(
        self,
        check: Literal["first", "always", "never"] = "first",
        probe_tolerance: Positive | None = None,
    ) -> None:
        check_choice("callbacks.weight_sync.check", check, ("first", "always", "never"))
        self.check, self.probe_tolerance = check, probe_tolerance
        self.syncs = 0  # in this process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        refuse_broken(pl_module)  # later `Ending` sees to that
        with (
            data.ledger.phase("engine_start"),
            data.bars.phase("starting the engine", 1, "engines"),
        ):
            data.engine.wake()
        self.sync(trainer, pl_module)

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sync(trainer, pl_module)

    def sync(self, trainer: Trainer, pl_module: LightningModule, check: bool = False) -> None:
        """Pushes the weights; the engine is awake afterwards.

        Args:
            check: compares them even where `check` of the callback does not ask for it.

        Raises:
            RuntimeError: the engine's weights are not the trainer's.
        """
        check |= self.check == "always" or (self.check == "first" and self.syncs < CHECKED)
        self.syncs += 1
        ledger, engine = trainer.datamodule.ledger, trainer.datamodule.engine
        with ledger.phase("weight_sync"):
            engine.wake()
            engine.load_weights(pl_module.named_weights(), ledger.updates)
            problem = self.problem(trainer, pl_module) if check else None
        if check and (told := [each for each in all_gather(problem) if each]):
            raise RuntimeError(told[0])  # on every rank, whichever engine it is

    def problem(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """What is wrong between this rank's engine and the trainer; collective where weights are
        sharded."""
        engine = trainer.datamodule.engine
        checksum = engine.checksum()
        if checksum is not None:
            held = getattr(torch, engine.dtype)  # the trainer's may be finer, or coarser
            if checksum != weights_checksum(pl_module.named_weights(), held):
                return STALE
            return None
        setting = setting_of(trainer, pl_module, autocast=False)
        probed = probe(trainer, pl_module, setting, autocast=False)
        limit = probed.limit if self.probe_tolerance is None else self.probe_tolerance
        if probed.gap <= limit:
            return None
        if math.isinf(probed.gap):
            return (
                f"{OTHERWISE} Log-probs of a probe are not finite, though the trainer's weights are:"
                f" the numbers outgrow their format ({setting.formats}), or the engine is broken."
            )
        told = on_probe(probed.found, setting)
        return (
            f"{STALE if told is None else OTHERWISE} On a probe their log-probs differ by"
            f" {probed.gap:.3g} nats a token, over callbacks.weight_sync.probe_tolerance={limit:.3g}."
            + (f" Likely cause: {told}." if told else "")
        )


def refuse_broken(module: LightningModule) -> None:
    """Raises a UserError, on every rank, if weights of the policy are NaN or inf."""
    mine = broken_weights(module.policy.named_parameters())
    found = sorted({name for names in all_gather(mine) for name in names})
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        dtype = str(next(module.policy.parameters()).dtype).removeprefix("torch.")
        raise UserError(
            f"The policy's weights are not finite: {', '.join(found[:3])}{more} hold NaN or inf"
            f" (in {dtype}), so there is nothing left to draw from. If they were so at the start,"
            " give other weights by model.path or init_from; if training made them so, resume the"
            " last checkpoint with model.dtype=float32, a lower algo.optimizer.lr or"
            " trainer.gradient_clip_val."
        )
