"""Seconds of a rollout step against its size: what grows faster than the work does.

    python -m rlzoo.bench growth

The whole loop runs as users start it (plan, shares, reward, credit, microbatches, losses,
Lightning, weight sync, log, file of rollouts), but prompts, engine and policy cost next to nothing
(rlzoo/bench/_growth_parts.py), so that what is timed is rlzoo's own. Along each axis one number of
`AXES` grows and the others stay; the runs of an axis make their steps in turn, each in a process of
its own that waits for its turn.

The last line is JSON: `exponent_AXIS` is the slope of log seconds over log size between the two
largest points, where fixed costs matter least, in median over repeats, with least and largest
(`_low`, `_high`); 1 is linear, 0 is flat. `seconds_AXIS` are the medians, smallest size first.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from rlzoo.bench._interleaved import interleaved
from rlzoo.bench.loop import Case, Worker, make_inputs, own_command, specification

PARTS = "rlzoo.bench._growth_parts"
BASE = {"prompts": 256, "group": 4, "length": 64, "data": 0}  # data 0: as many as a step's prompts
AXES: dict[str, list[int]] = {
    "prompts": [256, 1024, 4096, 16384],
    "group": [4, 16, 64],
    "length": [64, 256, 1024, 2048],
    "data": [1_000, 10_000, 100_000, 1_000_000],
}


def parts(size: dict[str, int]) -> dict[str, list[str]]:
    """What the worker is told beside the sizes of a step."""
    count = max(size["data"], size["prompts"])
    return {
        "data": ["~data", f"+data._target_={PARTS}.MadePrompts", f"+data.num_train={count}"],
        "engine": ["~engine", f"+engine._target_={PARTS}.MadeUp"],
        "overrides": [
            f"algo._target_={PARTS}.Cheap",
            "callbacks.rollout_log.rollouts_every=1",
            "callbacks.doctor=null",
        ],
    }


def slopes(sizes: Sequence[int], seconds: Sequence[Sequence[float]]) -> list[float]:
    """Of log seconds over log size between the last two sizes, in each repeat.

    Args:
        seconds: of each size, one a repeat.
    """
    step = math.log(sizes[-1] / sizes[-2])
    return [math.log(b / a) / step for a, b in zip(seconds[-2], seconds[-1], strict=True)]


def measure(axis: str, sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds and slopes along an axis."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_files:
        workers: dict[str, Worker] = {}
        inputs = make_inputs(Case("1m", 1, 1, 1, 1, question=8), Path(folder))
        try:
            for value in sizes:
                size = BASE | {axis: value}
                case = Case("1m", size["prompts"], size["group"], updates=2, limit=size["length"])
                log = open_files.enter_context(open(Path(folder) / f"{value}.log", "wb"))
                spec = specification(case, *inputs[:2]) | parts(size)
                workers[str(value)] = Worker(own_command(), spec, log)
                workers[str(value)].ready()
            found = interleaved({name: w.step for name, w in workers.items()}, repeats)
        finally:
            for worker in workers.values():
                worker.close()
    for name, worker in workers.items():
        took = {k: median(s[k] for s in worker.steps[1:]) for k in worker.steps[-1]}
        phases = {k.removeprefix("seconds/"): v for k, v in took.items() if k.startswith("seconds")}
        shown = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in phases.items())
        print(f"{axis:8} {int(name):>9,}  {shown}", flush=True)
    seconds = [found[str(value)] for value in sizes]
    its = slopes(sizes, seconds)
    return {
        f"exponent_{axis}": round(median(its), 3),
        f"exponent_{axis}_low": round(min(its), 3),
        f"exponent_{axis}_high": round(max(its), 3),
        f"seconds_{axis}": [round(median(each), 4) for each in seconds],
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlzoo.bench growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rollout steps of each size")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--points", type=int, default=0, help="sizes of each axis; 0: all")
    arguments = parser.parse_args(argv)
    figures: dict[str, Any] = {}
    for axis in arguments.axes:
        sizes = AXES[axis][: arguments.points or None]
        figures |= measure(axis, sizes, arguments.repeats)
    print(json.dumps(figures))
