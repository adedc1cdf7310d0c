from __future__ import annotations

import math
from typing import Literal

from lightning import Callback

from rlzoo.callbacks.state import Run
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.learning.metrics import PassMetrics
from rlzoo.values import AtLeast0

SHARE = 0.1  # of the responses drawn, that every=auto spends on validation


class Validation(Callback):
    """avg@k and pass@k on held-out prompts, before the first update and at boundaries.

    Driven here and not by Lightning's `val_check_interval`, which a resume may skip. Responses are
    drawn from the stream "val", which the budget does not pay for but the ledger counts.

    Args:
        every: rollout steps between two validations; 0 validates before and after the run only,
            "auto" as often as makes validation at most SHARE of the responses drawn between two.
    """

    def __init__(self, every: AtLeast0 | Literal["auto"] = 5) -> None:
        self.every = every

    def due(self, data: RolloutDataModule, ended: bool, pilots: int = 0) -> bool:
        """Whether a boundary validates.

        Args:
            data: at the boundary.
            ended: whether it is the last one.
            pilots: that are drawn for each plan of budgets.
        """
        every = self.interval(data, pilots)
        return ended or (every > 0 and data.rollout_step % every == 0)

    def interval(self, data: RolloutDataModule, pilots: int = 0) -> int:
        """Rollout steps between two validations; 0 for none between first and last."""
        if self.every != "auto":
            return self.every
        drawn = data.responses_per_step + pilots / data.steps_per_epoch
        cost = len(data.val_prompts) * data.val_responses
        return math.ceil(cost * (1 - SHARE) / SHARE / drawn)

    def validate(self, run: Run, data: RolloutDataModule) -> None:
        """Adds `val/avg_at_K`, `val/pass_at_k`, `val/stderr` and `val/length` to the row.

        What it costs is booked as "sampling/val", "verifying/val" and "gathering/val".
        """
        k = data.val_responses
        metrics = PassMetrics(ks=[k_ for k_ in (1, 2, 4, 8, 16, 32, 64) if k_ < k] + [k])
        budgets = [k] * len(data.val_prompts)
        rollouts = run.drawer.draw(data.val_prompts, budgets, "val", data.rollout_step)
        metrics.sync_on_compute = False  # every rank holds all rollouts
        metrics.update(rollouts.rewards, rollouts.group_ids)
        figures = metrics.compute()
        run.row |= {f"val/{name}": v for name, v in figures.items() if name.startswith("pass")}
        run.row |= {f"val/avg_at_{k}": figures["avg_at_n"], "val/stderr": figures["avg_stderr"]}
        run.row["val/length"] = float(rollouts.lengths.double().mean())
