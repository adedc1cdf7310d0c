"""The most memory that each phase of a run has taken."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PHASES = {  # of the ledger's, by the names that a forecast has for them
    "training": "training",
    "scoring": "training",
    "weight_sync": "syncing",
    "planning": "planning",
    "sampling": "sampling",
}


class Peaks:
    """Largest bytes by phase: of tensors on a GPU, or resident ones of this process.

    Args:
        gpu: whether it is this process's GPU that is looked at.

    Attributes:
        bytes: by phase, by the names that PHASES has for them.
    """

    def __init__(self, gpu: bool) -> None:
        self.bytes: dict[str, float] = {}
        self.begin, self.peak = (reset_gpu, gpu_peak) if gpu else (reset_process, process_peak)

    def note(self, phase: str) -> None:
        """Books the peak since the last note; `phase` is what the ledger calls it."""
        name = PHASES.get(phase.partition("/")[0])
        if name is not None:
            self.bytes[name] = max(self.bytes.get(name, 0), self.peak())
        self.begin()


def reset_gpu() -> None:
    torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> float:
    return float(torch.cuda.max_memory_allocated())


def reset_process() -> None:
    """Makes the kernel's mark of the most memory that of now, where it lets us."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return


def process_peak() -> float:
    """The kernel's mark; 0 where it has none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)
