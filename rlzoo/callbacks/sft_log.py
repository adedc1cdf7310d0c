from __future__ import annotations

from lightning import Callback

from rlzoo.algos.sft import SFT
from rlzoo.callbacks.state import Run
from rlzoo.data.sft import SFTDataModule


class SFTLog(Callback):
    """One row per boundary of supervised training: losses, learning rate, what was spent."""

    def write(self, run: Run, data: SFTDataModule, algo: SFT) -> None:
        """Takes the loss of the validation batches, and writes the row; collective."""
        if data.val_pairs:
            with run.ledger.phase("validating"):
                batches = data.validation(algo.tokens_per_microbatch, algo.pads)
                run.row["val/loss"] = algo.mean_loss(batches)
        figures = algo.means.compute()
        algo.means.reset()
        algo.grad_norms.clear()
        lr = algo.trainer.optimizers[0].param_groups[0]["lr"]
        row = {"rollout_step": data.rollout_step, "lr": lr}
        row |= figures | run.row | run.ledger.row()
        for logger in algo.trainer.loggers:
            logger.log_metrics(row, data.rollout_step)
        run.last_row, run.row = row, {}
        validated = f"{row['val/loss']:.4f}" if "val/loss" in row else "-"
        run.bars.print_line(
            f"update {run.ledger.updates:>6}  loss {row['loss']:.4f}  val {validated}"
            f"  lr {row['lr']:.2e}  {row['time/seconds']:.0f} s"
        )
