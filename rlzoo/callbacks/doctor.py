from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from rlzoo.diagnosis.causes import EXACT, Evidence, verdict
from rlzoo.diagnosis.suspects import probe, setting_of


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
        self.stop, self.done = stop, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        self.done = data.rollout_step > 0 or data.replay is not None
        if data.replay is None:
            setting = setting_of(trainer, pl_module)
            pl_module.evidence = Evidence(setting, probe(trainer, pl_module, setting))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.done:
            return
        self.done = True
        data, figures = trainer.datamodule, pl_module.gap()
        if figures:
            close = figures["logprob_gap/mean"] <= EXACT
            cause = "" if close else pl_module.cause_of_gap(data.rollouts)
            data.bars.print_line(verdict(figures, cause, pl_module.max_logprob_gap))
        if self.stop:
            raise Diagnosed
