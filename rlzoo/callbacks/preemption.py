from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from types import FrameType

from lightning import Callback

from rlzoo.callbacks.state import Run
from rlzoo.ranks.exchange import world

log = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was told to stop, and has saved all it did."""


class Preemption(Callback):
    """SIGTERM, or SLURM's SIGUSR1: finish the rollout step, save, stop. A second one stops at once.

    The ranks agree at each boundary, so it is enough that one of them was told. On SIGUSR1 under
    SLURM the job is put back into the queue; it goes on where it stopped if it was started with
    `ckpt_path=auto`.
    """

    def listen(self, run: Run) -> None:
        """Has the signals tell the run."""

        def told(number: int, frame: FrameType | None) -> None:
            if run.told_to_stop is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            run.told_to_stop = signal.Signals(number).name
            print(
                f"\nrlzoo: {run.told_to_stop}: finishing the rollout step in progress, then saving."
                " Once more stops at once.",
                file=sys.stderr,
                flush=True,
            )

        # After Lightning's own, which sends to other ranks from inside the handler.
        signal.signal(signal.SIGTERM, told)
        if "SLURM_JOB_ID" in os.environ:
            signal.signal(signal.SIGUSR1, told)

    def stop(self, signal_: str) -> None:
        """Raises Preempted, once the checkpoint is written."""
        if signal_ == "SIGUSR1" and world()[0] == 0:
            requeue()
        raise Preempted(signal_)


def requeue() -> None:
    """Puts this SLURM job back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        log.warning("scontrol requeue %s failed: %s", job, done.stderr.strip())
