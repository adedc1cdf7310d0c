from __future__ import annotations

from lightning import Callback

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.callbacks.state import Run
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.diagnosis.causes import EXACT, Evidence, verdict
from rlzoo.diagnosis.probe import probe, setting_of


class Diagnosed(Exception):
    """The doctor has said what was asked for; the run ends."""


class Doctor(Callback):
    """Compares engine and trainer on the first rollout step, and says in one line what it found.

    Args:
        stop: ends the run there, before anything is trained (`doctor=true`).
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop, self.done = stop, False

    def examine(self, run: Run, data: RolloutDataModule, algo: PolicyAlgorithm) -> None:
        """Looks at both before anything is drawn."""
        self.done = data.rollout_step > 0 or data.replay is not None
        if data.replay is None:
            bos = data.tokenizer.bos_token_id
            setting = setting_of(algo, run.engine, data.params, bos)
            probed = probe(algo, run.engine, data.train_prompts, setting)
            algo.evidence = Evidence(setting, probed)

    def compare(self, run: Run, algo: PolicyAlgorithm) -> None:
        """Says how far apart they are on the first rollout step, before it is trained on.

        Raises:
            Diagnosed: if that was all that was asked for.
        """
        if self.done:
            return
        self.done = True
        figures = algo.gap()
        if figures:
            close = figures["logprob_gap/mean"] <= EXACT
            cause = "" if close else algo.gap_watch.cause(algo)
            run.bars.print_line(verdict(figures, cause, algo.max_logprob_gap))
        if self.stop:
            raise Diagnosed
