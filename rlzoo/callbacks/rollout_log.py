from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.callbacks.state import Run
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.data.rollout_files import RolloutWriter
from rlzoo.learning.advantages import group_stats
from rlzoo.models.flops import peak_of
from rlzoo.ranks.exchange import world
from rlzoo.report.loggers import CSVLogger
from rlzoo.rewards.base import Verdict, is_right
from rlzoo.types import Rollouts
from rlzoo.values import AtLeast0, PathText, Positive

log = logging.getLogger(__name__)

ROLLOUTS = r"rollouts/step_(\d{6,})\.parquet"  # the files that a run writes, by its steps
PARTIAL = r"(?:\.partial)?"  # a file that was not finished
BUDGETS = r"budgets/epoch_(\d{4,})\.parquet"  # and by its epochs


class RolloutLog(Callback):
    """Writes what happened in a rollout step: loggers, `ledger.csv`, `rollouts/`, the step line.

    A file of rollouts is written by a thread of rank 0 while the run goes on. It is whole before
    the next one is begun, before a checkpoint is taken and before the run ends.

    Args:
        run_dir: where the files go.
        rollouts_every: rollout steps between two files of rollouts; 0 writes none.
        peak_tflops: what a device can do, for `time/mfu`; see `rlzoo.models.flops.peak_of`.
    """

    def __init__(
        self,
        run_dir: PathText,
        rollouts_every: AtLeast0 = 1,
        peak_tflops: Positive | None = None,
    ) -> None:
        self.run_dir, self.rollouts_every = Path(run_dir), rollouts_every
        self.peak_tflops = peak_tflops
        self.ledger_csv = CSVLogger(run_dir, "ledger.csv")
        self.files = RolloutWriter()
        self.spent: dict[str, float] = {"other": 0.0}  # seconds by phase up to the last row

    def begin(self, run: Run, data: RolloutDataModule, loggers: list[Logger]) -> None:
        """Cuts back to where the run stands; writes what stands in the row, a first validation."""
        run.bars.k = data.val_responses
        self.spent.setdefault("other", run.ledger.spent()["other"])  # older checkpoints have none
        if world()[0] == 0:
            self.remove_later_files(data.rollout_step, data.epoch + data.epoch_in_progress())
        if run.row:
            self.write_row(run, data, loggers, {})

    def write(self, run: Run, data: RolloutDataModule, algo: PolicyAlgorithm) -> None:
        """Writes the rollout step that has been trained on; collective."""
        assert run.rollouts is not None
        row = rollout_figures(run.rollouts) | algo.means.compute() | algo.gap()
        row |= mean_norms(algo.grad_norms)
        row["lr"] = algo.trainer.optimizers[0].param_groups[0]["lr"]
        if not run.rollouts.replayed:
            run.row["rounds"] = run.rollouts.rounds
        algo.means.reset()
        algo.grad_norms.clear()
        self.write_row(run, data, algo.trainer.loggers, row, partial(self.speed, run, algo))
        if self.rollouts_every and data.rollout_step % self.rollouts_every == 0:
            path = self.run_dir / "rollouts" / f"step_{run.rollouts.rollout_step:06d}.parquet"
            if world()[0] == 0:
                self.files.write(path, run.rollouts, data.tokenizer)

    def write_row(
        self,
        run: Run,
        data: RolloutDataModule,
        loggers: list[Logger],
        figures: dict[str, float],
        speed: Callable[[float], dict[str, float]] = lambda seconds: {},
    ) -> None:
        added, run.row = run.row, {}
        if world()[0] != 0:
            return
        totals = run.ledger.row()
        epoch = max(0, data.rollout_step - 1) // data.steps_per_epoch
        row = {"rollout_step": data.rollout_step, "epoch": epoch} | figures | added
        row |= {name: value for name, value in totals.items() if not name.startswith("time/")}
        row |= self.phase_seconds(totals)
        row["time/seconds"] = totals["time/seconds"]
        if run.rollouts and run.rollouts.sampling_seconds:
            drawn = int(run.rollouts.lengths.sum())
            row["time/tokens_per_second"] = drawn / run.rollouts.sampling_seconds
        row |= speed(row.get("time/training", 0.0))
        for logger in loggers:
            logger.log_metrics(row, data.rollout_step)
        self.ledger_csv.log_metrics({"rollout_step": data.rollout_step} | totals)
        run.bars.print_step(row)
        run.last_row = row

    def speed(self, run: Run, algo: PolicyAlgorithm, seconds: float) -> dict[str, float]:
        """How fast the updates of a rollout step were, on each device; MFU where its peak is known.

        Args:
            seconds: of training.
        """
        assert run.rollouts is not None
        flops = algo.training_flops(run.rollouts)
        if not flops or not seconds:
            return {}
        rate = flops / seconds / world()[1] / 1e12
        peak = self.peak_tflops or peak_of(algo.device, str(algo.trainer.precision))
        mfu = {} if peak is None else {"time/mfu": rate / peak}
        return {"time/training_tflops": rate} | mfu

    def phase_seconds(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each phase, and of all else ("other"), since the last row, by column.

        Args:
            totals: of `Ledger.row`.
        """
        names = [n for n in totals if n.startswith("time/") and n != "time/seconds"]
        spent = {name.removeprefix("time/"): totals[name] for name in names}
        earlier, self.spent = self.spent, spent
        return {f"time/{name}": value - earlier.get(name, 0.0) for name, value in spent.items()}

    def remove_later_files(self, rollout_step: int, epoch: int) -> None:
        """Removes what an interrupted run wrote after the checkpoint that is resumed."""
        for pattern, first in ((ROLLOUTS, rollout_step), (BUDGETS, epoch)):
            folder, name = pattern.split("/")
            for path in (self.run_dir / folder).glob("*.parquet*"):
                found = re.fullmatch(name + PARTIAL, path.name)  # a file of someone else's stays
                if found and int(found.group(1)) >= first:
                    path.unlink()

    def written(self) -> None:
        """Returns once all files are; a checkpoint waits for it."""
        self.files.wait()

    def on_train_end(self, *args: Any) -> None:
        self.files.wait()

    def on_exception(self, *args: Any) -> None:
        try:
            self.files.wait()
        except Exception as error:  # the exception that ends the run is the one to show
            log.warning("The last file of rollouts could not be written: %s", error)

    def state_dict(self) -> dict[str, Any]:
        return {"ledger_csv": self.ledger_csv.state_dict(), "phases": dict(self.spent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger_csv.load_state_dict(state["ledger_csv"])
        self.spent = dict(state["phases"])


def mean_norms(norms: list[dict[str, float]]) -> dict[str, float]:
    """Mean gradient norm of each parameter group over the updates; the policy's is `grad_norm`."""
    means = {}
    for name in dict.fromkeys(name for update in norms for name in update):
        found = [update[name] for update in norms if name in update]
        means["grad_norm" if name == "policy" else f"grad_norm/{name}"] = sum(found) / len(found)
    return means


def rollout_figures(rollouts: Rollouts) -> dict[str, float]:
    """What a rollout step's row says of its rollouts; no rollouts give counts of 0 alone."""
    budgets = torch.bincount(rollouts.group_ids, minlength=len(rollouts.prompts)).double()
    figures: dict[str, float] = {
        "num_rollouts": len(rollouts),
        "num_groups": len(rollouts.prompts),
        "near_ties": rollouts.num_near_ties,
        "policy_version": rollouts.policy_version,
    }
    if not len(rollouts):
        return figures
    lengths, rewards = rollouts.lengths.double(), rollouts.rewards.double()
    degenerate = group_stats(rewards, rollouts.group_ids).degenerate.double()
    return figures | {
        "reward": float(rewards.mean()),
        "accept_rate": share(is_right(rollouts.rewards)),
        "unverifiable": share(rollouts.verdicts.eq(Verdict.UNVERIFIABLE)),
        "unverifiable/gold": rollouts.num_unparsed_golds / len(rollouts),
        "truncated": share(rollouts.truncated),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "single_groups": share(budgets.eq(1)),
        "degenerate_groups": float((degenerate / budgets[rollouts.group_ids]).sum() / len(budgets)),
        "budget/min": float(budgets.min()),
        "budget/mean": float(budgets.mean()),
        "budget/max": float(budgets.max()),
    }


def share(flags: Tensor) -> float:
    return float(flags.double().mean())
