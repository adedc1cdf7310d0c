"""One GRPO rollout step of rlzoo and of TRL's `GRPOTrainer`, in turn, on the same work.

    make trl                                         # TRL in an environment of its own
    python -m rlzoo.bench loop --output experiments/speed/loop.jsonl

Both sides have the same policy, prompts, group size, length limit, updates, optimizer, reward and
threads; each runs in a process of its own that waits before every step until it is told to go on.
A step is all there is from one draw to the next: sampling, reward, old log-probs, updates, the new
weights for sampling, the log's row. rlzoo runs with its defaults and `engine=transformers`; TRL
without gradient checkpointing, once with plain generation and once with transformers' continuous
batching, whose cache is bounded (its default takes most of the machine's memory). The faster of the
two is compared; one that takes twice as long in its first step is left out and named. Nothing is
saved or validated on either side.

The tiny policy ends its responses as it learnt to: skewed lengths. The random ones, of 25M
parameters with 32,000 tokens and of SmolLM2-135M's shape, never end before the limit, or end with
a fixed probability at each token ("skewed").

Each case is a line of JSON: seconds (median, least, largest), tokens drawn, forward passes and
slots (tokens with padding) by phase, share of each phase, updates, what differs, TRL's version and
settings. The last line has, for each case, the median of paired ratios of seconds, TRL's over
rlzoo's, with the least and the largest pair (`_low`, `_high`); `trl_over_rlzoo_skewed` is that of
tiny_float32, `trl_over_rlzoo_equal` that of 25m_float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

import rlzoo
from rlzoo.bench._interleaved import Ratio, figures, interleaved, ratio
from rlzoo.bench._random_policies import save_policy, write_questions
from rlzoo.data.arithmetic import ArithmeticPrompts
from rlzoo.errors import UserError
from rlzoo.models.loading import TINY

ROOT = Path(rlzoo.__file__).parents[1]
TRL_PYTHON = ROOT / "build" / "oracles" / "trl" / "bin" / "python"
HEADLINES = {"skewed": "tiny_float32", "equal": "25m_float32"}
PHASES = ("sampling", "reward", "scoring", "update")


@dataclass(frozen=True)
class Case:
    """What both sides do in a step."""

    shape: str  # of the policy: "tiny", which ships with rlzoo, or a random one
    prompts: int  # a step, every step the same
    group: int  # responses a prompt
    updates: int
    limit: int  # tokens of a response
    question: int = 0  # tokens of a random policy's questions
    mean_length: float | None = None  # of a random policy's responses; None: all at the limit
    bf16: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Of a random policy's prompts: the question between the tokens of two roles."""
        return self.question + 2


TINY_STEP = Case("tiny", prompts=32, group=8, updates=4, limit=96)
EQUAL_25M = Case("25m", prompts=8, group=4, updates=4, limit=64, question=16)
SKEWED_25M = replace(EQUAL_25M, limit=128, mean_length=32.0)
EQUAL_135M = Case("135m", prompts=2, group=4, updates=2, limit=32, question=16)
CASES = {
    "tiny_float32": TINY_STEP,
    "tiny_bf16": replace(TINY_STEP, bf16=True),
    "25m_float32": EQUAL_25M,
    "25m_bf16": replace(EQUAL_25M, bf16=True),
    "25m_skewed_float32": SKEWED_25M,
    "135m_float32": EQUAL_135M,
    "135m_bf16": replace(EQUAL_135M, bf16=True),
    "1m_float32": Case("1m", prompts=4, group=4, updates=2, limit=16, question=8),  # to try it out
}


class Worker:
    """A trainer in a process of its own that makes one rollout step at a time.

    Attributes:
        steps: what it said of each.
    """

    def __init__(self, command: Sequence[str], spec: dict[str, Any], log: IO[bytes]) -> None:
        self.log, self.steps = log, list[dict[str, Any]]()
        self.process = subprocess.Popen(
            [*command, json.dumps(spec)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """Waits for the first gate; facts of the worker."""
        facts: dict[str, Any] = self.said()["ready"]
        return facts

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self.said())

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            tail = Path(self.log.name).read_text(errors="replace")[-3000:]
            raise UserError(
                f"A worker of the bench ended (exit {self.process.returncode}):\n{tail}"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.kill()
        self.process.wait()


# --- what both are given ------------------------------------------------------------------------


def make_inputs(case: Case, folder: Path) -> tuple[str, Path, int]:
    """The policy's directory, the file of questions, parameters of the policy."""
    questions = folder / "questions.jsonl"
    if case.shape != "tiny":
        count = save_policy(folder / "policy", case.shape, case.mean_length)
        write_questions(questions, case.prompts, case.question)
        return str(folder / "policy"), questions, count
    prompts = ArithmeticPrompts(num_train=case.prompts, num_val=1, num_test=1).load("train")
    rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in prompts]
    questions.write_text("\n".join(rows) + "\n")
    return str(TINY), questions, 905_472


def specification(case: Case, policy: str, questions: Path) -> dict[str, Any]:
    """What each worker is told."""
    return {
        "policy": policy,
        "questions": str(questions),
        "prompts_per_step": case.prompts,
        "group": case.group,
        "updates": case.updates,
        "max_prompt_tokens": 128,
        "max_response_tokens": case.limit,
        "bf16": case.bf16,
    }


def own_command() -> list[str]:
    return [sys.executable, "-m", "rlzoo.bench._loop_rlzoo"]


def sides(options: argparse.Namespace, base: dict[str, Any]) -> dict[str, tuple[list[str], Any]]:
    """The command and the specification of each side."""
    other = [str(options.trl), "-m", "rlzoo.bench._loop_trl"]
    found = {"rlzoo": (own_command(), base | {"overrides": options.overrides})}
    base = base | {"microbatch": options.microbatch, "trl": json.loads(options.trl_settings)}
    for name in options.modes:
        found[f"trl_{name}"] = (other, base | {"continuous": name == "continuous"})
    return found


def slower(workers: dict[str, Worker]) -> list[str]:
    """Those of TRL's that took more than twice as long as another of its for their last step."""
    took = {side: w.steps[-1]["seconds"] for side, w in workers.items() if side != "rlzoo"}
    return [side for side, seconds in took.items() if seconds > 2 * min(took.values())]


# --- one case -----------------------------------------------------------------------------------


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The line of a case."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        policy, questions, parameters = make_inputs(case, Path(folder))
        base = specification(case, policy, questions)
        workers: dict[str, Worker] = {}
        try:
            for side, (command, spec) in sides(options, base).items():
                log = open(Path(folder) / f"{side}.log", "wb")  # noqa: SIM115 (the worker's)
                workers[side] = Worker(command, spec, log)
            facts = {side: worker.ready() for side, worker in workers.items()}
            for worker in workers.values():
                worker.step()
            left_out = {side: workers[side].steps[-1]["seconds"] for side in slower(workers)}
            runs = {side: w.step for side, w in workers.items() if side not in left_out}
            seconds = interleaved(runs, options.repeats)
            steps = {side: workers[side].steps[2:] for side in runs}
        finally:
            for worker in workers.values():
                worker.close()
    found = {side: summary(seconds[side], steps[side]) for side in steps}
    line = {"case": name, **asdict(case), "parameters": parameters, "repeats": options.repeats}
    ratios = {s: ratio(seconds[s], seconds["rlzoo"]) for s in seconds if s != "rlzoo"}
    best = min(ratios, key=lambda side: median(seconds[side]))
    line |= figures("trl_over_rlzoo", ratios[best]) | {"faster_trl": best}
    for side, its in ratios.items():
        line |= figures(f"{side}_over_rlzoo", its)
    other = next(side for side in facts if side != "rlzoo")
    line |= {"left_out": left_out, "differs": differences(found, best)}
    line |= {"machine": machine(facts["rlzoo"]["threads"])}
    return line | {"sides": found, "trl": facts[other]["trl"], "trl_settings": settings_of(facts)}


def settings_of(facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {side: said["settings"] for side, said in facts.items() if "settings" in said}


def summary(seconds: Sequence[float], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the timed steps of one side."""

    def mid(key: str) -> float:
        return float(median(step.get(key, 0.0) for step in steps))

    inner = [phase for phase in PHASES if phase != "update"]
    shares = {p: median(s.get(f"seconds/{p}", 0.0) / s["seconds"] for s in steps) for p in inner}
    shares["update"] = 1 - sum(shares.values())  # and all else
    counted = sorted({key for step in steps for key in step if key.startswith(("slots", "passes"))})
    return {
        "seconds": round(median(seconds), 4),
        "seconds_low": round(min(seconds), 4),
        "seconds_high": round(max(seconds), 4),
        "tokens": mid("tokens"),
        "updates": mid("updates"),
        "shares": {phase: round(share, 3) for phase, share in shares.items()},
        **{key: mid(key) for key in counted},
    }


def differences(found: dict[str, dict[str, Any]], best: str) -> dict[str, list[float]]:
    """What rlzoo and the faster TRL did not do alike: rlzoo's figure and TRL's."""
    ours, theirs = found["rlzoo"], found[best]
    keys = ["tokens", "updates", *(k for k in ours if k.startswith(("slots", "passes")))]
    return {key: [ours[key], theirs.get(key, 0)] for key in keys if ours[key] != theirs.get(key, 0)}


def machine(threads: int) -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "threads": threads, "processor": platform.processor()} | {
        "torch": torch.__version__,
        "bf16": "avx512_bf16" in Path("/proc/cpuinfo").read_text(),
    }


# --- all of them --------------------------------------------------------------------------------


def headline(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last line."""
    found: dict[str, float] = {}
    names = {line["case"]: line for line in lines}
    for key, case in [*HEADLINES.items(), *((name, name) for name in names)]:
        if case in names:
            its = names[case]
            low, high = its["trl_over_rlzoo_low"], its["trl_over_rlzoo_high"]
            found |= figures(f"trl_over_rlzoo_{key}", Ratio(its["trl_over_rlzoo"], low, high))
    return found


def show(line: dict[str, Any]) -> None:
    print(f"\n{line['case']}: TRL {line['trl']} takes {line['trl_over_rlzoo']:.2f} times as long")
    head = "".join(f"{name:>10}" for name in ("seconds", "low", "high", "tokens", *PHASES))
    print(f"{'':18}{head}")
    for side, its in line["sides"].items():
        cells = [its["seconds"], its["seconds_low"], its["seconds_high"]]
        shares = "".join(f"{its['shares'][phase]:>10.1%}" for phase in PHASES)
        print(
            f"{side:18}" + "".join(f"{c:>10.3f}" for c in cells) + f"{its['tokens']:>10.0f}{shares}"
        )
    for side, seconds in line["left_out"].items():
        print(f"{side:18}{seconds:>10.3f}  in its first step: left out")
    for key, (ours, theirs) in line["differs"].items():
        print(f"  differs: {key}: rlzoo {ours:g}, TRL {theirs:g}")
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlzoo.bench loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = [name for name in CASES if not name.startswith("1m")]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=usual)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--output", type=Path, help="a file for the lines, written anew")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of TRL")
    parser.add_argument("--microbatch", type=int, default=0, help="rows of TRL's; 0: an update's")
    parser.add_argument("--trl", type=Path, default=TRL_PYTHON, help="its interpreter")
    parser.add_argument("--trl-settings", default="{}", help="more of GRPOConfig, as JSON")
    parser.add_argument("--overrides", nargs="*", default=[], help="more of rlzoo's command line")
    options = parser.parse_args(argv)
    if not options.trl.exists():
        raise UserError(f"TRL's interpreter is not at {options.trl}: run `make trl` first.")
    lines = []
    for name in options.cases:
        lines.append(measure(name, options))
        show(lines[-1])
    lines.append(headline(lines))
    if options.output:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(json.dumps(lines[-1]))


MODES = ["plain", "continuous"]
