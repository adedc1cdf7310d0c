"""`python -m rlzoo.bench._watched OVERRIDES`: `rlzoo.run` that says where it is, for `bench resume`.

Rank 0 keeps two bytes in a memory-mapped file, so that what they say outlives a SIGKILL: the place
of the outermost phase of its ledger in PHASES, and the microbatches trained in the rollout step.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlzoo.launch.processes import is_first
from rlzoo.report.ledger import Ledger
from rlzoo.run import main

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
WHERE = "RLZOO_BENCH_WHERE"  # environment variable that names the file


def phase_of(name: str) -> str:
    """The one of PHASES that a phase of the ledger belongs to."""
    kind, _, stream = name.partition("/")
    whole = {"val": "validating", "pilot": "planning"}.get(stream, kind)
    return {"engine_start": "starting", "gathering": "verifying"}.get(whole, whole)


def watch(path: Path) -> None:
    """Keeps the file at `path` up to date from now on, in this process.

    Args:
        path: a file of two bytes.
    """
    from rlzoo.callbacks import TrainingPhase

    with path.open("r+b") as file:
        where = mmap.mmap(file.fileno(), 2)
    phase, batch_end = Ledger.phase, TrainingPhase.on_train_batch_end

    def mark(stack: list[str]) -> None:
        where[0] = PHASES.index(phase_of(stack[0]) if stack else "between")

    @contextmanager
    def marked_phase(ledger: Ledger, name: str) -> Iterator[None]:
        with phase(ledger, name):
            if name == "training":
                where[1] = 0
            mark(ledger._stack)
            try:
                yield
            finally:
                mark(ledger._stack[:-1])

    def marked_batch_end(callback: TrainingPhase, *args: Any) -> None:
        where[1] += 1
        batch_end(callback, *args)

    Ledger.phase, TrainingPhase.on_train_batch_end = marked_phase, marked_batch_end


if __name__ == "__main__":
    if is_first():
        watch(Path(os.environ[WHERE]))
    main()
