from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from rlzoo.doctor import APART, likely_cause, verdict
from rlzoo.engines.probe import HALF_GAP, in_half_precision, probe_sequences, trainer_scores


class Diagnosed(Exception):
    """The doctor has said what was asked for; the run ends."""


class Doctor(Callback):
    """Compares engine and trainer on the first rollout step, and says in one line what it found.

    Args:
        stop: ends the run there, before anything is trained (`doctor=true`).

    Raises:
        Diagnosed: from `on_train_batch_start`, if `stop`.
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop, self.probe_gap, self.done = stop, None, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        self.done = data.rollout_step > 0 or data.replay is not None
        if not self.done:
            sequences = probe_sequences(pl_module.policy)
            expected = trainer_scores(pl_module.policy, sequences, pl_module.device)
            gaps = torch.cat(data.engine.score(sequences)) - torch.cat(expected)
            self.probe_gap = float(gaps.abs().mean())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.done:
            return
        self.done = True
        data = trainer.datamodule
        old = data.rollouts.scores.get("old_logprobs", [])  # absent where nothing was scored
        pairs = zip(old, data.rollouts.sampler_logprobs, strict=bool(old))
        gaps = [(ours - theirs).abs() for ours, theirs in pairs if len(ours)]
        if gaps:
            half = in_half_precision(trainer.precision, data.engine.dtype)
            cause = likely_cause(gaps, self.probe_gap, HALF_GAP if half else APART)
            data.bars.print_line(verdict(pl_module.gap(), cause, pl_module.max_logprob_gap))
        if self.stop:
            raise Diagnosed
