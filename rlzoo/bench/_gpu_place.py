"""What the items of `gpu_check` have in common: where they run, what they found, how a run and the
tests are started, and random policies of any size."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from rlzoo.launch.summary import read_metrics
from rlzoo.models.loading import TINY
from rlzoo.types import Prompt, Rollouts

ROOT = Path(__file__).parents[2]
TOKENS = 300  # of the shipped tokenizer, all with a text
Sizes = dict[str, Any]  # of a Qwen2Config
QWEN_1_5B: Sizes = {  # Qwen2.5-1.5B, by its published config.json
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
SMALL: Sizes = {  # the same in small, for what a CPU can show
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Failed(RuntimeError):
    """What an item tried did not come to its end."""


@dataclass
class Found:
    """What an item found; ok if nothing is wrong."""

    figures: dict[str, float | str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # and why

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)


@dataclass(frozen=True)
class Place:
    """Where the items run.

    Attributes:
        folder: of this item, for whatever it leaves.
        gpus: to be used; 0 is a CPU, on which everything is small.
    """

    folder: Path
    gpus: int

    @property
    def cuda(self) -> bool:
        return self.gpus > 0

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    def sized(self, gpu: int, cpu: int) -> int:
        return gpu if self.cuda else cpu

    @property
    def trainer(self) -> tuple[str, ...]:
        """Overrides that a run has here."""
        return ("trainer=gpu",) if self.cuda else ("num_threads=1",)

    @cached_property
    def policy(self) -> Path:
        """A directory with a random policy; made once for all items of a check."""
        path = self.folder.parent / "policy"
        if not (path / "config.json").exists():
            save_policy(QWEN_1_5B if self.cuda else SMALL, path, self.device)
        return path

    # --- what is started --------------------------------------------------------------------

    def command(self, name: str, *overrides: str) -> list[str]:
        """A run in the folder NAME, which `MemoryWatch` looks at."""
        watch = f"{{_target_: rlzoo.bench._gpu_watch.MemoryWatch, file: '{self.memory(name)}'}}"
        given = (f"run_dir={self.folder / name}", f"+callbacks.memory={watch}", "logger=csv")
        return [sys.executable, "-m", "rlzoo.run", *given, *self.trainer, *overrides]

    def memory(self, name: str) -> Path:
        return self.folder / f"{name}.memory.jsonl"

    def run(self, name: str, *overrides: str) -> list[dict[str, str]]:
        """The rows of metrics.csv of a run that must succeed.

        Raises:
            Failed: it did not.
        """
        self.finish(self.start(self.command(name, *overrides), name), name)
        return read_metrics(self.folder / name / "metrics.csv")

    def start(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        """A process in a group of its own, of this item's session; what it says is added to
        NAME.txt."""
        with (self.folder / f"{name}.txt").open("ab") as said:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, process_group=0
            )

    def finish(self, process: subprocess.Popen[bytes], name: str) -> None:
        code = process.wait()
        if code:
            said = self.folder / f"{name}.txt"
            raise Failed(f"exit code {code}: {last_line(said)} ({said} has it all)")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_when(
        self, process: subprocess.Popen[bytes], holds: Callable[[], bool], name: str
    ) -> None:
        """SIGKILL for a run, at the moment that something holds.

        Raises:
            Failed: it ended before.
        """
        while not holds():
            if process.poll() is not None:
                raise Failed(
                    f"ended before it was killed: {last_line(self.folder / f'{name}.txt')}"
                )
            time.sleep(0.02)
        self.kill(process)

    def tests(self, found: Found, *arguments: str) -> None:
        """Runs tests of the repository; figures are the properties that they record."""
        if not (ROOT / "tests").is_dir():
            found.left_out.append("the tests, which are in a checkout of the repository alone")
            return
        report = self.folder / "report.xml"
        options = ["-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}"]
        options += ["-o", "junit_family=xunit1"]  # the one with properties
        process = self.start([sys.executable, "-m", "pytest", *options, *arguments], "pytest")
        code = process.wait()
        if not report.exists():
            raise Failed(f"pytest, exit code {code}: {last_line(self.folder / 'pytest.txt')}")
        counts = read_report(report, found)
        found.figures |= counts
        found.expect(counts["passed"] > 0, "no test ran")


def read_report(report: Path, found: Found) -> dict[str, int]:
    """Adds what pytest's report says, and counts tests by their end."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ET.parse(report).getroot().iter("testcase"):
        faults = [*case.findall("failure"), *case.findall("error")]
        end = "failed" if faults else "skipped" if case.find("skipped") is not None else "passed"
        counts[end] += 1
        for fault in faults:
            words = " ".join((fault.get("message") or "").split())
            found.wrong.append(f"{case.get('name')}: {words[:200]}")
        for property_ in case.iter("property"):
            with contextlib.suppress(ValueError):
                found.figures[str(property_.get("name"))] = float(property_.get("value") or "nan")
    return counts


def last_line(file: Path) -> str:
    """What a run said it ended by, or what a process said last."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    ends = [line for line in lines if line.startswith("rlzoo: ")]
    return (ends or lines or ["it said nothing"])[-1].strip()


def memory_lines(file: Path) -> list[dict[str, Any]]:
    """What `MemoryWatch` left, a line for each boundary."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def column(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    """The figures of a column, of the rows that have one."""
    return [float(row[name]) for row in rows if row.get(name)]


# --- policies and rollouts ----------------------------------------------------------------------


def save_policy(sizes: Sizes, folder: Path, device: str) -> None:
    """A random Qwen2 with the shipped tokenizer, whose tokens are the first of its vocabulary."""
    config = Qwen2Config(
        **sizes,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in Path(TINY).iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, folder)


def skewed_lengths(count: int, median: int, longest: int) -> np.ndarray:
    """[count] tokens: log-normal with the spread of long reasoning, cut at the longest."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), 0.77, count)
    lengths: np.ndarray = np.clip(drawn, 1, longest).astype(int)
    return lengths


def made_up(lengths: np.ndarray, group: int, prompt_tokens: int) -> Rollouts:
    """Rollouts of random text, half of them right."""
    generator = np.random.default_rng(1)

    def draw(count: int) -> torch.Tensor:
        return torch.from_numpy(generator.integers(2, TOKENS, count))

    count = len(lengths) // group
    prompts = [
        Prompt(f"p{i}", "q", "a", token_ids=tuple(draw(prompt_tokens).tolist()))
        for i in range(count)
    ]
    responses = [draw(n) for n in lengths.tolist()]
    rewards = torch.arange(len(lengths)) % 2
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(count).repeat_interleave(group),
        responses=responses,
        sampler_logprobs=[torch.full((len(r),), -7.0) for r in responses],
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
        rewards=rewards.float(),
        verdicts=rewards.to(torch.int8),
        policy_version=0,
        rollout_step=0,
    )
