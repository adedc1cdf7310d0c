"""Times things side by side: in one session, in turn, so that what else the machine does falls on
all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple


class Ratio(NamedTuple):
    """Of paired seconds: each repeat of the slow one over the same repeat of the fast one."""

    median: float
    low: float  # the smallest pair's
    high: float  # the largest pair's


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each run, by its name; one more call of each is not timed.

    Every repeat calls all of them, in the given order and backwards by turns.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            began = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """How many times as long the slow one takes: median, least and largest of the pairs."""
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(median(pairs), min(pairs), max(pairs))


def figures(name: str, found: Ratio) -> dict[str, float]:
    """A ratio as keys of a bench's last line."""
    shown = {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: round(value, 4) for key, value in shown.items()}
