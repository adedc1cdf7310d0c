"""For runs of `gpu_check`: a callback that keeps what a device's memory held in each phase, and a
reward for policies that know nothing."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning import Callback

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.callbacks.state import Run
from rlzoo.ranks.whereabouts import HERE
from rlzoo.types import Prompt

GB = 1e9


def device_gb() -> float:
    """What is taken of the GPU, by whomever; without one, what this process holds resident."""
    if not torch.cuda.is_available():
        return float(psutil.Process().memory_info().rss) / GB
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GB


class MemoryWatch(Callback):
    """Adds a line of JSON to a file at each boundary: the most that was taken of the device at the
    borders of each phase, and what was taken when training began, while the engine sleeps. (Peaks
    of torch's own within a phase are in the run's forecast.json.)

    Args:
        file: where the lines go.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.phase, self.seen, self.asleep = "starting", dict[str, float](), 0.0
        HERE.listener = self.look

    def look(self) -> None:
        """Books what has been used since the last look under the phase that was going on."""
        self.seen[self.phase] = max(self.seen.get(self.phase, 0.0), device_gb())
        self.phase = HERE.phases[0] if HERE.phases else "between"

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # or what torch keeps for itself would count
            self.asleep = device_gb()

    def on_boundary(self, run: Run, algo: PolicyAlgorithm) -> None:
        line = {"asleep_gb": self.asleep, "phases_gb": self.seen}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.seen, self.asleep = {}, 0.0


class Coin:
    """Half of all texts are right, each always or never."""

    def __call__(
        self, prompts: Sequence[Prompt], texts: Sequence[str], truncated: Sequence[bool]
    ) -> list[float]:
        return [float(zlib.crc32(text.encode()) % 2) for text in texts]
