from __future__ import annotations

from lightning import LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback


class SFTLog(BoundaryCallback):
    """One row per boundary of supervised training: losses, learning rate, what was spent."""

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        if data.val_batches:
            with data.ledger.phase("validating"):
                data.row["val/loss"] = pl_module.mean_loss(data.val_batches)
        figures = pl_module.means.compute()
        pl_module.means.reset()
        pl_module.grad_norms.clear()
        row = {"rollout_step": data.rollout_step, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        row |= figures | data.row | data.ledger.row()
        for logger in trainer.loggers:
            logger.log_metrics(row, data.rollout_step)
        data.last_row, data.row = row, {}
        validated = f"{row['val/loss']:.4f}" if "val/loss" in row else "-"
        data.bars.print_line(
            f"update {data.ledger.updates:>6}  loss {row['loss']:.4f}  val {validated}"
            f"  lr {row['lr']:.2e}  {row['time/seconds']:.0f} s"
        )
