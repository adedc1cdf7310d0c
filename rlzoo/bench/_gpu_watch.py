"""A callback that keeps what a device's memory held in each phase of a run, for `gpu_check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning import Callback

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.callbacks.state import Run
from rlzoo.ranks.whereabouts import HERE

GB = 1e9


def device_gb() -> float:
    """What is taken of the GPU, by whomever; without one, what this process holds resident."""
    if not torch.cuda.is_available():
        return float(psutil.Process().memory_info().rss) / GB
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GB


class MemoryWatch(Callback):
    """Adds a line of JSON to a file at each boundary: the largest use seen at the borders of each
    phase, torch's own peak within it, and what was taken when training began, while the engine
    sleeps.

    Args:
        file: where the lines go.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.phase, self.seen, self.asleep = "starting", dict[str, dict[str, float]](), 0.0
        HERE.listener = self.look

    def look(self) -> None:
        """Books what has been used since the last look under the phase that was going on."""
        found = self.seen.setdefault(self.phase, {"device_gb": 0.0, "torch_gb": 0.0})
        found["device_gb"] = max(found["device_gb"], device_gb())
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / GB
            found["torch_gb"] = max(found["torch_gb"], peak)
            torch.cuda.reset_peak_memory_stats()
        self.phase = HERE.phases[0] if HERE.phases else "between"

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # or what torch keeps for itself would count
            self.asleep = device_gb()

    def on_boundary(self, run: Run, algo: PolicyAlgorithm) -> None:
        line = {"asleep_gb": self.asleep, "phases": self.seen}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.seen, self.asleep = {}, 0.0
