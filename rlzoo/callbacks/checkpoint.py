from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from rlzoo.callbacks.state import Cursor, Run
from rlzoo.errors import UserError
from rlzoo.models.checkpoints import BEST, FORMAT, SAVED, UNFINISHED, WEIGHTS_ALONE, saved_by
from rlzoo.models.gather import whole_state
from rlzoo.ranks.exchange import all_gather
from rlzoo.report.columns import AVG
from rlzoo.values import AtLeast0, AtLeast1, PathText, Positive, Text

log = logging.getLogger(__name__)


class Checkpoint(Callback):
    """Saves at boundaries, to `checkpoints/step_N.ckpt`, where `last.ckpt` points; of the best ones
    it keeps the weights alone, in `checkpoints/weights_N.ckpt`, where `best.ckpt` points.

    A checkpoint is whole or absent: it is written aside and renamed, and older ones are removed
    after that. Under DDP it is a file, under DeepSpeed and FSDP a folder with a part for each rank.
    It holds how many rows each logger had written, and a resume cuts their files back to that.
    Weights alone are one file under every strategy, in the numbers that the strategy holds them in,
    for an export, for `init_from` and for `resume=weights`.

    Besides, the last boundary of a run is saved, and one at which it was told to stop.

    Args:
        run_dir: where `checkpoints/` is.
        every: rollout steps between two checkpoints; None: by seconds alone.
        every_seconds: seconds, by rank 0's clock, after which the next boundary saves; None: by
            steps alone.
        monitor: column of metrics.csv whose largest value is the best; null keeps no best. A name
            under `val/` that the first validation does not give is refused, another that the first
            rollout step does not give is warned of.
        keep_best: how many of the best are kept, those with the largest `monitor`.
        asynchronous: writes the file from a thread, on a copy of everything in memory, while the
            next rollout step is drawn. Not under DeepSpeed and FSDP, which write for themselves.
    """

    def __init__(
        self,
        run_dir: PathText,
        every: AtLeast1 | None = 1,
        every_seconds: Positive | None = None,
        monitor: Text | None = "val/avg_at_8",
        keep_best: AtLeast0 = 1,
        asynchronous: bool = False,
    ) -> None:
        self.folder, self.monitor = Path(run_dir) / "checkpoints", monitor
        self.every, self.every_seconds = every, every_seconds
        self.saved_at = time.monotonic()
        self.keep_best = keep_best if monitor is not None else 0
        self.validated = False  # whether the first validation gave the monitor
        self.best: list[tuple[float, str]] = []  # (score, name) of those kept, the best one first
        self.kept: dict[str, list[str]] = {}  # by checkpoint being saved: names of the best by then
        self.asynchronous = asynchronous

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        if not self.asynchronous:
            return
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, AsyncCheckpointIO) or not isinstance(io.checkpoint_io, PublishingIO):
            raise UserError(
                "callbacks.checkpoint.asynchronous=true needs a strategy that saves one file, not"
                f" {type(trainer.strategy).__name__}. Set it to false, or take strategy=ddp."
            )
        io.checkpoint_io.publish = self.publish

    def begin(self, run: Run, trainer: Trainer) -> None:
        """Checks the monitor, and makes Lightning count the epoch that begins when a run is resumed
        at the end of one.

        It takes that for a resume inside an epoch. The checkpoints of the epoch would then say that
        none is in progress, and resumes of those that none of its microbatches was trained, until
        optimizer steps were made of microbatches of two.
        """
        self.check_monitor(run)
        if trainer.is_global_zero:
            self.point_to_best()  # as of the checkpoint that is gone on from
        loop = trainer.fit_loop
        total = vars(loop.epoch_progress.total)  # of a class that Lightning does not declare
        if loop.restarted_mid_epoch and total["processed"] == total["ready"]:
            loop.reset_restart_stage()

    def save_if_due(self, run: Run, cursor: Cursor, trainer: Trainer, preempted: bool) -> None:
        """Saves at every so many rollout steps, at the best one so far, and before any end."""
        step = cursor.rollout_step
        found = run.last_row.get(self.monitor or ""), time.monotonic() - self.saved_at
        score, seconds = all_gather(found)[0]  # rank 0 alone has the row, and its clock counts
        if trainer.is_global_zero and step == 1:
            self.warn_of_monitor(run.last_row)
        weights = f"weights_{step:06d}.ckpt"
        if self.ranked(score, weights):
            with run.ledger.phase("checkpointing"):
                self.save_weights(trainer, weights)
        if run.ended_by or preempted or self.due(step, seconds):
            with run.ledger.phase("checkpointing"):
                self.save(trainer, f"step_{step:06d}.ckpt")
            self.saved_at = time.monotonic()

    def due(self, step: int, seconds: float) -> bool:
        """Whether so many rollout steps, or seconds since the last checkpoint, ask for one."""
        by_steps = self.every is not None and step % self.every == 0
        return by_steps or (self.every_seconds is not None and seconds >= self.every_seconds)

    def check_monitor(self, run: Run) -> None:
        """Refuses a `val/` name that the validation before the first update has not given.

        Raises:
            UserError: on every rank, since rank 0 alone has the row.
        """
        columns = all_gather(sorted(run.last_row))[0]
        wanted = self.monitor or ""
        self.validated = wanted in columns
        if self.keep_best and wanted.startswith("val/") and columns and wanted not in columns:
            there = ", ".join(name for name in columns if name.startswith("val/"))
            raise UserError(
                f"callbacks.checkpoint.monitor={wanted} is no column of metrics.csv, so no"
                f" checkpoint would ever be the best. The validation gives {there}. Name one of"
                " them, or null."
            )

    def warn_of_monitor(self, row: dict[str, Any]) -> None:
        if self.keep_best and self.monitor not in row and not self.validated:
            log.warning(
                f"callbacks.checkpoint.monitor={self.monitor} is not among the columns of the first"
                f" rollout step ({', '.join(row)}): unless a later one has it, best.ckpt will never"
                " be made."
            )

    def ranked(self, score: float | None, name: str) -> bool:
        """Whether a checkpoint of this score is among the best, which it then is one of."""
        if score is None or not self.keep_best:
            return False
        if math.isnan(score):  # no figure is the best of any
            return False
        if len(self.best) == self.keep_best and not score > self.best[-1][0]:
            return False
        self.best = sorted([*self.best, (score, name)], key=lambda kept: -kept[0])[: self.keep_best]
        return True

    def save(self, trainer: Trainer, name: str) -> None:
        self.flush(trainer)
        partial = self.folder / f"{name}.partial"
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in ours(self.folder, UNFINISHED) if not self.kept else ():
                remove(left)  # by a save that was killed
            self.kept[name] = [best for _, best in self.best]
        trainer.strategy.barrier("rlzoo.checkpoint")
        try:
            trainer.save_checkpoint(partial)
        except OSError:
            remove(partial)  # on a full disk, half a checkpoint takes the last room
            raise
        if trainer.is_global_zero and not self.asynchronous:
            self.publish(partial)

    def flush(self, trainer: Trainer) -> None:
        """Has the disk hold all that the counts to be saved speak of."""
        for logger in trainer.loggers:
            if hasattr(logger, "flush"):
                logger.flush()
        for part in vars(trainer)["callbacks"]:
            if hasattr(part, "written"):
                part.written()

    def save_weights(self, trainer: Trainer, name: str) -> None:
        """Writes weights, data position and counts to one file, which becomes the best; collective
        where weights are sharded."""
        self.flush(trainer)
        module, data = trainer.lightning_module, vars(trainer)["datamodule"]
        weights = whole_state(module, keep=trainer.is_global_zero)
        states = {part.state_key: part.state_dict() for part in vars(trainer)["callbacks"]}
        states = {key: found for key, found in states.items() if found}
        if not trainer.is_global_zero:
            return
        state = {"state_dict": weights, WEIGHTS_ALONE: True, "callbacks": states, "loops": {}}
        state[type(data).__qualname__] = data.state_dict()
        module.on_save_checkpoint(state)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{name}.partial"
        try:
            torch.save(state, partial)
        except OSError:
            remove(partial)
            raise
        os.replace(partial, self.folder / name)
        self.point_to_best()

    def publish(self, partial: Path) -> None:
        """Makes a whole checkpoint the last one, and removes those that are no longer kept."""
        name = partial.name.removesuffix(".partial")
        best = self.kept.pop(name)
        remove(self.folder / name)
        os.replace(partial, self.folder / name)
        point(self.folder / "last.ckpt", name)
        kept = {name, *best, *(other for _, other in self.best)}  # a thread may be late
        for path in [*ours(self.folder, SAVED), *ours(self.folder, BEST)]:
            if path.name not in kept:
                remove(path)

    def point_to_best(self) -> None:
        """Moves `best.ckpt`. What was the best stays until no checkpoint names it: `publish`."""
        if self.best:
            point(self.folder / "best.ckpt", self.best[0][1])

    def state_dict(self) -> dict[str, Any]:
        module, loggers = self._trainer.lightning_module, self._trainer.loggers
        states = {logger_key(x): x.state_dict() for x in loggers if hasattr(x, "state_dict")}
        by = {
            "strategy": strategy_name(self._trainer.strategy),
            "ranks": self._trainer.world_size,
            "model": module.model_name,
        }
        return {
            "format": FORMAT,
            "best": self.best,
            "monitor": self.monitor,
            "loggers": states,
            "saved_by": by,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved_by({"callbacks": {"Checkpoint": state}})
        if comparable(state.get("monitor", self.monitor), self.monitor):
            there = [(s, name) for s, name in state["best"] if (self.folder / name).exists()]
            self.best = there[: self.keep_best]
        elif self.keep_best:
            log.warning(
                f"callbacks.checkpoint.monitor is {self.monitor} now, and was {state['monitor']}:"
                " the best checkpoint is looked for anew."
            )
        states = state["loggers"]
        if isinstance(states, list):  # as older versions saved them
            own = [x for x in self._trainer.loggers if hasattr(x, "state_dict")]
            found = [saved for saved in states if saved]
            states = dict(zip(map(logger_key, own), found, strict=False))
        for logger in self._trainer.loggers:  # one that is new has nothing to go on from
            if hasattr(logger, "load_state_dict") and logger_key(logger) in states:
                logger.load_state_dict(states[logger_key(logger)])


def logger_key(logger: Logger) -> str:
    """What tells the loggers that keep a state from each other."""
    return f"{type(logger).__name__}/{logger.name}"


def comparable(monitor: str | None, other: str | None) -> bool:
    """Whether values of two columns can be ranked together; avg@k is of one figure for any k."""
    return monitor == other or all(str(name).startswith(AVG) for name in (monitor, other))


def strategy_name(strategy: Strategy) -> str:
    """What a checkpoint's parts depend on beside the number of ranks."""
    stage = getattr(strategy, "stage", None)
    return type(strategy).__name__ + (f" stage {stage}" if stage else "")


class PublishingIO(TorchCheckpointIO):
    """Writes a file and then says so, from whatever thread it is called in."""

    publish: Callable[[Path], None]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.publish(Path(path))


def asynchronous_io() -> AsyncCheckpointIO:
    """Lightning's plugin that saves from a thread; `Checkpoint` sets what follows a save."""
    return AsyncCheckpointIO(PublishingIO())


def ours(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """What in a folder has a name that is a whole match."""
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


def point(link: Path, name: str) -> None:
    """Makes `link` point to `name` beside it, at once: it is never absent."""
    aside = link.with_name(f"{link.name}.partial")
    remove(aside)
    aside.symlink_to(name)
    if link.is_dir() and not link.is_symlink():  # a copy that did not keep links made it a folder
        remove(link)
    os.replace(aside, link)


def remove(path: Path) -> None:
    """Removes a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
