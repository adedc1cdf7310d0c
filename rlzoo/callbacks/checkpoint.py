from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback
from rlzoo.errors import UserError

FORMAT = 1  # of the checkpoint; raised when old ones can no longer be resumed


class Checkpoint(BoundaryCallback):
    """Saves at boundaries: `checkpoints/last.ckpt`, and `best.ckpt` by a validation metric.

    Runs last, so that all outputs of the step are written. A checkpoint is whole or absent: it is
    written aside and renamed. It holds how many rows each logger had written, and a resume cuts
    their files back to that. Stops the run when the ledger's limits are reached.

    Args:
        run_dir: where `checkpoints/` is.
        every: rollout steps between two checkpoints.
        monitor: column of metrics.csv whose largest value is the best; null keeps no best.
    """

    def __init__(self, run_dir: str, every: int = 1, monitor: str | None = "val/avg_at_8") -> None:
        if every < 1:
            raise UserError(f"callbacks.checkpoint.every must be at least 1, got {every}.")
        self.folder, self.every, self.monitor = Path(run_dir) / "checkpoints", every, monitor
        self.best: float | None = None
        self._logger_states: list[dict] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        stopping = data.stop_reason() is not None
        score = trainer.datamodule.last_row.get(self.monitor)
        improved = score is not None and (self.best is None or score > self.best)
        if improved:
            self.best = score
        if stopping or improved or data.rollout_step % self.every == 0:
            with data.ledger.phase("checkpointing"):
                self.save(trainer, improved)
        if stopping:
            trainer.should_stop = True

    def save(self, trainer: Trainer, improved: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for logger in trainer.loggers:
            if hasattr(logger, "flush"):
                logger.flush()
        partial, last = self.folder / "last.ckpt.partial", self.folder / "last.ckpt"
        try:
            trainer.save_checkpoint(partial)
        except OSError:
            partial.unlink(missing_ok=True)  # on a full disk, half a checkpoint takes the last room
            raise
        if improved and trainer.is_global_zero:
            best = self.folder / "best.ckpt.partial"
            shutil.copyfile(partial, best)
            os.replace(best, self.folder / "best.ckpt")
        if trainer.is_global_zero:
            os.replace(partial, last)

    def state_dict(self) -> dict[str, Any]:
        loggers = self._trainer.loggers
        states = [x.state_dict() if hasattr(x, "state_dict") else {} for x in loggers]
        return {"format": FORMAT, "best": self.best, "loggers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["format"] != FORMAT:
            raise UserError(
                f"The checkpoint has format {state['format']}, this version of rlzoo reads"
                f" {FORMAT}. Take its weights alone with init_from=CHECKPOINT."
            )
        self.best = state["best"]
        for logger, logger_state in zip(self._trainer.loggers, state["loggers"], strict=True):
            if logger_state:
                logger.load_state_dict(logger_state)
