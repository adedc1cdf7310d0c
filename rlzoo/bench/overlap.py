"""`pipeline=one_step` against the same run without it, on the same two processes.

    python -m rlzoo.bench overlap

The trainer has one thread, the engine one in a process of its own (`engine=transformers_process`),
in both: two cores, of which the plain run uses one at a time. An epoch of twelve rollout steps is
timed whole, its first step, which nothing overlaps, and its last, which overlaps nothing, included.

How much there is to win depends on how even drawing and training are: with S and T seconds, at most
(S + T) / max(S, T). So the responses of a rollout step are chosen first, from --responses, so that
S and T are nearest to each other in a plain run of four steps: with few, drawing costs more. The
line of the choice says what they were. Then runs with and without overlap take turns. The last line
is JSON with
    overlap_ratio: seconds of the plain epoch over those of the overlapped one, median of paired
        runs; overlap_ratio_low, overlap_ratio_high: the smallest and the largest pair;
    bound: what the epoch could win at most, by the plain run's S and T;
    responses: of a rollout step; sampling_seconds, training_seconds: S and T a step, medians;
    waiting_share: of the overlapped epoch's seconds, in which the trainer waited for the engine.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from statistics import median

from rlzoo.bench._interleaved import figures, ratio
from rlzoo.bench._random_policies import SHAPES
from rlzoo.bench._runs import Row, model_of, rows_of, seconds

STEPS = 12  # of the epoch
GROUP = 8
BOTH = ("engine=transformers_process", "algo.tis_cap=2.0")
SAMPLING = ("sampling", "verifying", "gathering", "waiting")
TRAINING = ("scoring", "training", "weight_sync")


def epoch(responses: int, steps: int, updates: int) -> tuple[str, ...]:
    """Overrides of a run of one epoch of so many rollout steps."""
    return (
        f"datamodule.responses_per_step={responses}",
        f"datamodule.responses_per_prompt={GROUP}",
        f"datamodule.prompts_per_epoch={steps * responses // GROUP}",
        f"algo.updates={updates}",
        f"limits.max_updates={steps * updates}",
        "data.num_train=2048",
    )


def bound(sampling: float, training: float, steps: int = STEPS) -> float:
    """Ratio of the epochs if nothing but the order cost time; S and T of a step."""
    overlapped = sampling + (steps - 1) * max(sampling, training) + training
    return steps * (sampling + training) / overlapped


def parts(rows: Sequence[Row]) -> tuple[float, float]:
    """S and T: median seconds of a step."""
    each = [(seconds([row], *SAMPLING), seconds([row], *TRAINING)) for row in rows]
    return median(s for s, _ in each), median(t for _, t in each)


def most_even(model: Sequence[str], choices: Sequence[int], updates: int) -> int:
    """The responses a step with which drawing and training take the most equal time."""
    uneven = {}
    for responses in choices:
        sampling, training = parts(rows_of(*model, *BOTH, *epoch(responses, 4, updates))[1:])
        uneven[responses] = abs(math.log(sampling / training))
        print(f"{responses} responses: sampling {sampling:.2f} s, training {training:.2f} s")
    return min(uneven, key=lambda responses: uneven[responses])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench overlap")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--policy", default="tiny", choices=("tiny", *SHAPES))
    parser.add_argument("--responses", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--updates", type=int, default=4)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model, choices = model_of(args.policy, folder), args.responses
        responses = choices[0] if len(choices) == 1 else most_even(model, choices, args.updates)
        shared = (*model, *BOTH, *epoch(responses, STEPS, args.updates))
        found: dict[str, list[list[Row]]] = {"none": [], "one_step": []}
        for repeat in range(args.repeats):
            for name in sorted(found, reverse=repeat % 2 == 1):
                found[name].append(rows_of(*shared, f"pipeline={name}"))
                print(f"pipeline={name}: {seconds(found[name][-1]):.2f} s an epoch")
    plain, ahead = ([seconds(rows) for rows in found[name]] for name in found)
    sampling, training = parts([row for rows in found["none"] for row in rows])
    waiting = sum(seconds(rows, "waiting") for rows in found["one_step"])
    line = figures("overlap_ratio", ratio(plain, ahead)) | {
        "bound": round(bound(sampling, training), 4),
        "responses": responses,
        "sampling_seconds": round(sampling, 4),
        "training_seconds": round(training, 4),
        "waiting_share": round(waiting / sum(ahead), 4),
        "policy": args.policy,
    }
    print(json.dumps(line))
