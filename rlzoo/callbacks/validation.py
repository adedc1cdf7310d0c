from __future__ import annotations

from lightning import Callback

from rlzoo.callbacks.state import Run
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.learning.metrics import PassMetrics
from rlzoo.values import AtLeast0


class Validation(Callback):
    """avg@k and pass@k on held-out prompts, before the first update and at boundaries.

    Driven here and not by Lightning's `val_check_interval`, which a resume may skip. Responses are
    drawn from the stream "val", which the budget does not pay for but the ledger counts.

    Args:
        every: rollout steps between two validations; 0 validates before and after the run only.
    """

    def __init__(self, every: AtLeast0 = 5) -> None:
        self.every = every

    def due(self, rollout_step: int, ended: bool) -> bool:
        return ended or (self.every > 0 and rollout_step % self.every == 0)

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
