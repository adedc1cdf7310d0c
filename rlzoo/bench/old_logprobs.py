"""`algo.old_logprobs=engine` against `trainer`: seconds of a rollout step, with four updates.

    python -m rlzoo.bench old_logprobs

Runs take turns, `engine=transformers` and one thread in both. The first step, which is scored in
both, is left out. The last line is JSON with, for each policy,
    NAME_training_ratio: seconds of scoring and training a step, trainer over engine, median of
        paired runs; _low, _high: the smallest and the largest pair;
    NAME_step_ratio, _low, _high: the same of the whole step;
    NAME_saved_seconds: seconds a step that are saved, median; NAME_scoring_seconds: that scoring
        took with `trainer`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from statistics import median

from rlzoo.bench._interleaved import figures, ratio
from rlzoo.bench._random_policies import SHAPES
from rlzoo.bench._runs import Row, model_of, rows_of, seconds

STEPS = 4
TRAINING = ("scoring", "training")
RESPONSES = {"tiny": 256, "1m": 64, "25m": 16, "135m": 8}


def shared(policy: str, updates: int) -> tuple[str, ...]:
    responses = RESPONSES[policy]
    return (
        "engine=transformers",
        f"algo.updates={updates}",
        f"datamodule.responses_per_step={responses}",
        f"datamodule.prompts_per_epoch={responses}",
        "datamodule.responses_per_prompt=8",
        f"limits.max_updates={STEPS * updates}",
    )


def measured(policy: str, repeats: int, updates: int) -> dict[str, float]:
    found: dict[str, list[list[Row]]] = {"trainer": [], "engine": []}
    with tempfile.TemporaryDirectory() as folder:
        options = (*model_of(policy, folder), *shared(policy, updates))
        for repeat in range(repeats):
            for name in sorted(found, reverse=repeat % 2 == 1):
                found[name].append(rows_of(*options, f"algo.old_logprobs={name}")[1:])
    steps = STEPS - 1
    training = {n: [seconds(rows, *TRAINING) / steps for rows in found[n]] for n in found}
    whole = {n: [seconds(rows) / steps for rows in found[n]] for n in found}
    saved = [a - b for a, b in zip(training["trainer"], training["engine"], strict=True)]
    scoring = [seconds(rows, "scoring") / steps for rows in found["trainer"]]
    line = figures(
        f"{policy}_training_ratio", ratio(training["trainer"], training["engine"])
    ) | figures(f"{policy}_step_ratio", ratio(whole["trainer"], whole["engine"]))
    line[f"{policy}_saved_seconds"] = round(median(saved), 4)
    line[f"{policy}_scoring_seconds"] = round(median(scoring), 4)
    print(line)
    return line


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench old_logprobs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--policies", nargs="+", default=["tiny", "25m"], choices=("tiny", *SHAPES))
    parser.add_argument("--updates", type=int, default=4)
    args = parser.parse_args(argv)
    lines = [measured(policy, args.repeats, args.updates) for policy in args.policies]
    print(json.dumps({key: value for line in lines for key, value in line.items()}))
