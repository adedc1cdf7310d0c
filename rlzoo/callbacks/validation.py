from __future__ import annotations

from lightning import LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback
from rlzoo.errors import UserError
from rlzoo.learning.metrics import PassMetrics
from rlzoo.values import AtLeast0


class Validation(BoundaryCallback):
    """avg@k and pass@k on held-out prompts, before the first update and at boundaries.

    Driven here and not by Lightning's `val_check_interval`, which a resume may skip. Responses are
    drawn from the stream "val", which the budget does not pay for but the ledger counts.

    Args:
        every: rollout steps between two validations; 0 validates before and after the run only.
    """

    def __init__(self, every: AtLeast0 = 5) -> None:
        if every < 0:
            raise UserError(f"val_every must be at least 0, got {every}.")
        self.every = every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.datamodule.rollout_step == 0:
            self.validate(trainer)

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = self.every and trainer.datamodule.rollout_step % self.every == 0
        if due or trainer.datamodule.stop_reason():
            self.validate(trainer)

    def validate(self, trainer: Trainer) -> None:
        """Adds `val/avg_at_K`, `val/pass_at_k`, `val/stderr` and `val/length` to the row.

        What it costs is booked as "sampling/val", "verifying/val" and "gathering/val".
        """
        data = trainer.datamodule
        k = data.val_responses
        metrics = PassMetrics(ks=[k_ for k_ in (1, 2, 4, 8, 16, 32, 64) if k_ < k] + [k])
        rollouts = data.drawer.draw(
            data.val_prompts, [k] * len(data.val_prompts), "val", data.rollout_step
        )
        metrics.sync_on_compute = False  # every rank holds all rollouts
        metrics.update(rollouts.rewards, rollouts.group_ids)
        figures = metrics.compute()
        data.row |= {f"val/{name}": v for name, v in figures.items() if name.startswith("pass")}
        data.row |= {f"val/avg_at_{k}": figures["avg_at_n"], "val/stderr": figures["avg_stderr"]}
        data.row["val/length"] = float(rollouts.lengths.double().mean())
