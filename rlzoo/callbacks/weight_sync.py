from __future__ import annotations

import math
from typing import Literal

import torch
from lightning import Callback

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.callbacks.broken import refuse_broken
from rlzoo.callbacks.state import Run
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.diagnosis.causes import on_probe
from rlzoo.diagnosis.probe import probe, setting_of
from rlzoo.engines.base import Engine, weights_checksum
from rlzoo.ranks.exchange import all_gather
from rlzoo.values import Positive

CHECKED = 2  # syncs that check=first compares: at start, and after the engine's first sleep
OTHERWISE = "After a weight sync engine and trainer do not agree."
STALE = (
    "After a weight sync the engine's weights differ from the trainer's: it would sample from"
    " another policy than the one being trained."
)


class WeightSync(Callback):
    """Hands the trainer's weights to the engine, in memory, with their version.

    Args:
        check: when the engine's weights are compared with the trainer's: "first" (at the first two
            syncs: at start, and once the engine has slept in between), "always" or "never". By
            checksum, or, where an engine packs its weights so that they cannot be read back, by
            the log-probs of a probe.
        probe_tolerance: mean |trainer - engine| log-prob of the probe's tokens that passes, nats;
            null is 1e-3 where both hold float32, and 0.1 in half precision, or what that alone does
            to this model's probe, thrice, if it can be measured and is more.
    """

    def __init__(
        self,
        check: Literal["first", "always", "never"] = "first",
        probe_tolerance: Positive | None = None,
    ) -> None:
        self.check, self.probe_tolerance = check, probe_tolerance
        self.syncs = 0  # in this process

    def begin(self, run: Run, data: RolloutDataModule, algo: PolicyAlgorithm) -> None:
        """Starts the engine, and gives it the weights."""
        refuse_broken(algo.policy)
        bar = run.bars.phase("starting the engine", 1, "engines")
        with run.ledger.phase("engine_start"), bar:
            run.engine.wake()
        self.sync(run, data, algo)

    def sync(self, run: Run, data: RolloutDataModule, algo: PolicyAlgorithm) -> None:
        """Pushes the weights; the engine is awake afterwards.

        Raises:
            RuntimeError: the engine's weights are not the trainer's.
        """
        check = self.check == "always" or (self.check == "first" and self.syncs < CHECKED)
        self.syncs += 1
        with run.ledger.phase("weight_sync"):
            run.engine.wake()
            run.engine.load_weights(algo.named_weights(), run.ledger.updates)
            problem = self.problem(run.engine, data, algo) if check else None
        if check and (told := [each for each in all_gather(problem) if each]):
            raise RuntimeError(told[0])  # on every rank, whichever engine it is

    def problem(self, engine: Engine, data: RolloutDataModule, algo: PolicyAlgorithm) -> str | None:
        """What is wrong between this rank's engine and the trainer; collective where weights are
        sharded."""
        checksum = engine.checksum()
        if checksum is not None:
            held = getattr(torch, engine.dtype)  # the trainer's may be finer, or coarser
            if checksum != weights_checksum(algo.named_weights(), held):
                return STALE
            return None
        bos = data.tokenizer.bos_token_id
        setting = setting_of(algo, engine, data.params, bos, autocast=False)
        probed = probe(algo, engine, data.train_prompts, setting, autocast=False)
        limit = probed.limit if self.probe_tolerance is None else self.probe_tolerance
        if probed.gap <= limit:
            return None
        if math.isinf(probed.gap):
            return (
                f"{OTHERWISE} Log-probs of a probe are not finite, though the trainer's weights"
                f" are: the numbers outgrow their format ({setting.formats}), or the engine is"
                " broken."
            )
        told = on_probe(probed.found, setting)
        return (
            f"{STALE if told is None else OTHERWISE} On a probe their log-probs differ by"
            f" {probed.gap:.3g} nats a token, over"
            f" callbacks.weight_sync.probe_tolerance={limit:.3g}."
            + (f" Likely cause: {told}." if told else "")
        )
