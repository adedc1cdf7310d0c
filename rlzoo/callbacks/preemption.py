from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from types import FrameType

from lightning import LightningModule, Trainer

from rlzoo.callbacks.boundary import BoundaryCallback
from rlzoo.ranks.exchange import world

log = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was told to stop, and has saved all it did."""


class Preemption(BoundaryCallback):
    """SIGTERM, or SLURM's SIGUSR1: finish the rollout step, save, stop. A second one stops at once.

    Stands last, after the checkpoint. The ranks agree at each boundary, so it is enough that one of
    them was told. On SIGUSR1 under SLURM the job is put back into the queue; it goes on where it
    stopped if it was started with `ckpt_path=auto`.

    Raises:
        Preempted: from a boundary, once the checkpoint is written.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule

        def told(number: int, frame: FrameType | None) -> None:
            if data.told_to_stop is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            data.told_to_stop = signal.Signals(number).name
            print(
                f"\nrlzoo: {data.told_to_stop}: finishing the rollout step in progress, then saving."
                " Once more stops at once.",
                file=sys.stderr,
                flush=True,
            )

        # After Lightning's own, which sends to other ranks from inside the handler.
        signal.signal(signal.SIGTERM, told)
        if "SLURM_JOB_ID" in os.environ:
            signal.signal(signal.SIGUSR1, told)

    def on_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        told = trainer.datamodule.preempted()
        if told is None or trainer.should_stop:
            return
        if told == "SIGUSR1" and world()[0] == 0:
            requeue()
        raise Preempted(told)


def requeue() -> None:
    """Puts this SLURM job back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        log.warning("scontrol requeue %s failed: %s", job, done.stderr.strip())
