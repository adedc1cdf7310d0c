"""How long a rollout step waits for the verifier, with answers verified as responses finish and,
for comparison, all together once the last one is drawn.

    python -m rlzoo.bench scoring

Both ways are runs as users start them, each in a process of its own that waits before every rollout
step until it is told to go on: the steps are timed in turn, and do the same work. `main` is the
default job. `25m` and `135m` are random policies of that many parameters whose responses have
skewed lengths; a written solution with an answer that takes the verifier some time (an expression,
a set, an interval) stands in for each.

Each case is a line of JSON. `waiting_share` is the share of a step's seconds in which nothing but
the verifier, or another rank, is waited for (the ledger's "verifying" and "gathering", pilots'
too), a median over steps; `waiting_share_off` is the same where answers wait for the last response;
`off_over_on` is how many times as long a step then takes, the median of paired steps with the least
and the largest pair (`_low`, `_high`). The last line has the figures of all cases, and
`waiting_share`, the largest of them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import torch
from hydra import compose

from rlzoo.bench._interleaved import figures, interleaved, ratio
from rlzoo.bench._loop_gate import Gate
from rlzoo.bench._random_policies import save_policy, write_questions
from rlzoo.bench.loop import Worker
from rlzoo.bench.verifier import response, symbolic
from rlzoo.errors import check_at_least
from rlzoo.launch.configuration import conf_dir
from rlzoo.launch.training import train
from rlzoo.loop import RolloutLoop
from rlzoo.rewards.base import Scores
from rlzoo.rewards.verifier import MathReward
from rlzoo.types import Prompt, Rollouts

WAITING = ("verifying/", "gathering/")  # how the ledger's phases of waiting begin


@dataclass(frozen=True)
class Case:
    """A random policy and its rollout steps; None is the default job."""

    shape: str
    prompts: int
    group: int
    limit: int  # tokens of a response
    mean_length: float


CASES: dict[str, Case | None] = {
    "main": None,
    "25m": Case("25m", prompts=8, group=8, limit=384, mean_length=96.0),
    "135m": Case("135m", prompts=4, group=8, limit=256, mean_length=96.0),
    "1m": Case("1m", prompts=4, group=4, limit=32, mean_length=16.0),  # to try it out
}


class AtTheEnd(MathReward):
    """Is given all responses together."""

    by_response = False


class Written(MathReward):
    """Verifies a written solution in place of each response, always the same for the same text."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        truncated: Sequence[bool],
        on_progress: Callable[[int], None] | None = None,
    ) -> Scores:
        draws = [random.Random(zlib.crc32(text.encode())) for text in texts]
        pairs = [symbolic(rng) for rng in draws]
        asked = [replace(p, answer=gold) for p, (gold, _) in zip(prompts, pairs, strict=True)]
        written = [response(rng, answer) for rng, (_, answer) in zip(draws, pairs, strict=True)]
        return super().__call__(asked, written, truncated, on_progress)


class WrittenAtTheEnd(Written):
    by_response = False


REWARDS = {"main": {"on": MathReward, "off": AtTheEnd}}
WRITTEN = {"on": Written, "off": WrittenAtTheEnd}


def overrides(case: Case, folder: Path) -> list[str]:
    """The command line of a random policy's run."""
    questions = folder / "questions.jsonl"
    return [
        *("model=hf", f"model.path={folder / 'policy'}", "lr=1.0e-9", "sampler=uniform"),
        *("data=jsonl", f"data.path={questions}", f"data.val_path={questions}"),
        *("data.template.system=null", "data.template.user_suffix=''", "callbacks.validation=null"),
        f"datamodule.prompts_per_epoch={case.prompts}",
        f"datamodule.responses_per_prompt={case.group}",
        f"datamodule.responses_per_step={case.prompts * case.group}",
        f"datamodule.max_response_tokens={case.limit}",
        *("callbacks.checkpoint.monitor=null", "callbacks.export=null"),
    ]


def work(spec: dict[str, Any]) -> None:
    """A run that waits at a gate before each rollout step."""
    gate, draw = Gate(), RolloutLoop.draw

    def paced(self: RolloutLoop) -> Rollouts:
        spent = self.run.ledger.spent()
        waited = sum(value for phase, value in spent.items() if phase.startswith(WAITING))
        gate.wait({"waited": waited}, {"threads": torch.get_num_threads()})
        return draw(self)

    setattr(RolloutLoop, "draw", paced)  # noqa: B010 (mypy takes no method for a variable)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("train", spec["overrides"])
    train(cfg)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """The line of a case."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        asked = ["engine=transformers", "limits.max_responses=null", "logger=csv"]
        if case is not None:
            save_policy(folder / "policy", case.shape, case.mean_length)
            write_questions(folder / "questions.jsonl", case.prompts, 16)
            asked += overrides(case, folder)
        workers: dict[str, Worker] = {}
        try:
            for side, kind in REWARDS.get(name, WRITTEN).items():
                reward = f"reward._target_={kind.__module__}.{kind.__qualname__}"
                spec = {"overrides": [*asked, reward, f"run_dir={folder / side}"]}
                log = open(folder / f"{side}.log", "wb")  # noqa: SIM115 (the worker's)
                command = [sys.executable, "-m", "rlzoo.bench", "scoring", "--worker"]
                workers[side] = Worker(command, spec, log)
            facts = {side: worker.ready() for side, worker in workers.items()}
            seconds = interleaved({side: w.step for side, w in workers.items()}, repeats)
            steps = {side: worker.steps[1:] for side, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    shares = {side: [s["waited"] / s["seconds"] for s in each] for side, each in steps.items()}
    return {
        "case": name,
        "waiting_share": round(median(shares["on"]), 4),
        "waiting_share_high": round(max(shares["on"]), 4),
        "waiting_share_off": round(median(shares["off"]), 4),
        "seconds": round(median(seconds["on"]), 3),
        "seconds_off": round(median(seconds["off"]), 3),
        **figures("off_over_on", ratio(seconds["off"], seconds["on"])),
        "threads": facts["on"]["threads"],
        "repeats": repeats,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlzoo.bench scoring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["main", "25m"])
    parser.add_argument("--repeats", type=int, default=5, help="timed rollout steps of each way")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work(json.loads(options.worker))
        return
    check_at_least("--repeats", options.repeats, 1)
    lines = []
    for name in options.cases:
        lines.append(measure(name, options.repeats))
        print(json.dumps(lines[-1]), flush=True)
    told = {f"{key}_{line['case']}": line[key] for line in lines for key in line if key != "case"}
    print(json.dumps({"waiting_share": max(line["waiting_share"] for line in lines), **told}))
