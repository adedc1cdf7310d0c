"""A callback that says where its run is, for `bench resume` to look at from outside.

Rank 0 keeps two bytes in a memory-mapped file, so that what they say outlives a SIGKILL: the place
of the outermost phase in PHASES, and the microbatches that the update in progress has trained on.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from lightning import Callback

from rlzoo.launch.processes import is_first
from rlzoo.ranks.whereabouts import HERE

PHASES = (
    "starting",  # up to the first phase: imports, process group, model, checkpoint, engine
    "sampling",
    "verifying",
    "scoring",
    "training",
    "weight_sync",
    "validating",
    "planning",
    "checkpointing",
    "between",  # phases: logs, rollouts/, advantages, and all that follows the last step
)


def phase_of(name: str) -> str:
    """The one of PHASES that a phase of the ledger belongs to."""
    kind, _, stream = name.partition("/")
    whole = {"val": "validating", "pilot": "planning"}.get(stream, kind)
    return {"engine_start": "starting", "gathering": "verifying"}.get(whole, whole)


class Watched(Callback):
    """Keeps the file up to date from now on, in this process.

    Args:
        where: a file of two bytes.
    """

    def __init__(self, where: str) -> None:
        with Path(where).open("r+b") as file:
            self.where = mmap.mmap(file.fileno(), 2)
        if is_first():
            HERE.listener = self.look

    def look(self) -> None:
        phase = phase_of(HERE.phases[0]) if HERE.phases else "between"
        self.where[0] = PHASES.index(phase)

    def on_after_backward(self, *args: Any) -> None:
        if is_first():
            self.where[1] += 1

    def on_train_batch_end(self, *args: Any) -> None:
        if is_first():
            self.where[1] = 0
