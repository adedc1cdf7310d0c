"""The update phase's share of what the machine can do (MFU), in float32 and bfloat16.

    python -m rlzoo.bench mfu

rlzoo trains a random Qwen2 of 25M parameters with 32,000 tokens on responses of one length, as
users start it (`rlzoo.bench.loop` has the worker). What counts is all of the phase "training":
forward and backward passes, losses, clipping, AdamW, Lightning. In turn with each rollout step, the
fastest of a few large matrix products gives the machine's peak in the same number format and
number of threads. Operations are those of `rlzoo.models.flops`: useful ones alone.

The last line is JSON: `mfu_float32` and `mfu_bf16`, medians over repeats, each of a step over the
peak beside it, with least and largest (`_low`, `_high`); rate and peak in 1e9 operations a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from rlzoo.bench._interleaved import interleaved
from rlzoo.bench._random_policies import make_policy
from rlzoo.bench.loop import Case, Worker, make_inputs, own_command, specification
from rlzoo.models.flops import policy_flops

SIDE, PRODUCTS = 2048, 4  # of a matrix; products timed for a peak
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def step_of(arguments: argparse.Namespace, bf16: bool) -> Case:
    return Case(
        arguments.shape,
        prompts=arguments.responses // 8,
        group=8,
        updates=2,
        limit=arguments.limit,
        question=14,
        bf16=bf16,
    )


def operations(case: Case) -> float:
    """Of a rollout step's updates, all of whose responses have the length of the limit."""
    responses = torch.full((case.prompts * case.group,), case.limit)
    flops = policy_flops(make_policy(case.shape), responses + case.prompt_tokens, responses)
    assert flops is not None
    return flops


def product_timer(dtype: torch.dtype, rates: list[float]) -> Callable[[], None]:
    """Times products of square matrices, and adds the best rate to `rates`."""
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)
    out = torch.empty_like(a)

    def timed() -> None:
        seconds = []
        for _ in range(PRODUCTS):
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - began)
        rates.append(2 * SIDE**3 / min(seconds))

    return timed


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """MFU of each repeat, in median, least and largest; rate and peak in GFLOP/s."""
    name = "bf16" if case.bf16 else "float32"
    peaks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        policy, questions, _ = make_inputs(case, Path(folder))
        spec = specification(case, policy, questions) | {"overrides": arguments.overrides}
        with open(Path(folder) / "log", "wb") as log:
            worker = Worker(own_command(), spec, log)
            try:
                torch.set_num_threads(int(worker.ready()["threads"]))
                runs = {"step": worker.step, "peak": product_timer(DTYPES[name], peaks)}
                interleaved(runs, arguments.repeats)
            finally:
                worker.close()
    flops = operations(case)
    rates = [flops / step["seconds/update"] for step in worker.steps[1:]]
    shares = [rate / peak for rate, peak in zip(rates, peaks[1:], strict=True)]
    found = {f"mfu_{name}": median(shares), f"mfu_{name}_low": min(shares)}
    found |= {f"mfu_{name}_high": max(shares), f"gflops_{name}": median(rates) / 1e9}
    return found | {f"peak_gflops_{name}": median(peaks[1:]) / 1e9}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlzoo.bench mfu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rollout steps")
    parser.add_argument("--shape", default="25m", help="of the policy")
    parser.add_argument("--responses", type=int, default=64, help="of a rollout step")
    parser.add_argument("--limit", type=int, default=112, help="tokens of a response")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--overrides", nargs="*", default=[], help="more of rlzoo's command line")
    arguments = parser.parse_args(argv)
    figures: dict[str, float] = {}
    for name in arguments.dtypes:
        found = measure(step_of(arguments, name == "bf16"), arguments)
        print(
            f"{name:8} {found[f'mfu_{name}']:.1%} of the peak: {found[f'gflops_{name}']:.0f} of"
            f" {found[f'peak_gflops_{name}']:.0f} GFLOP/s",
            flush=True,
        )
        figures |= found
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))
