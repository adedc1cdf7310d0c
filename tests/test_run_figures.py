"""What a run says of itself: seconds by stream, avg@k of its own k."""

import csv
import json
import re
import time
from pathlib import Path

import pytest
import torch

from rlzoo.data import draw
from rlzoo.data.draw import Drawer
from rlzoo.engines.base import Response, Responses, SamplingParams
from rlzoo.models.policy import load_tokenizer
from rlzoo.report.ledger import Ledger
from rlzoo.report.progress import Bars
from rlzoo.types import Prompt
from tests import warm

GVM = (  # one rollout step of 16 responses after 16 pilots, validated twice with 3 responses
    "sampler=gvm",
    "sampler.callback.pilots=2",
    "datamodule.responses_per_prompt=2",
    "datamodule.val_responses=3",
    "limits.max_responses=32",
)
RATES = ("time/tokens_per_second", "time/training_tflops")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's directory and what it printed."""
    run_dir = tmp_path_factory.mktemp("figures") / "run"
    return run_dir, warm.passed(run_dir, *GVM)


def test_seconds_of_training_pilots_and_validation_are_told_apart(run):
    start, step = rows_of(run[0] / "metrics.csv")
    for kind in ("sampling", "verifying"):
        assert float(start[f"time/{kind}/val"]) > 0 and not start[f"time/{kind}/train"]
        for stream in ("train", "pilot", "val"):
            assert float(step[f"time/{kind}/{stream}"]) > 0
    assert "time/sampling" not in step and "time/validating" not in step
    tokens = int(step["tokens/train"]) / float(step["time/sampling/train"])
    assert float(step["time/tokens_per_second"]) == pytest.approx(tokens, rel=0.05)


def test_the_row_says_how_fast_the_updates_were(run):
    start, step = rows_of(run[0] / "metrics.csv")[:2]
    assert not start.get("time/training_tflops")  # nothing was trained on before the first row
    assert 0 < float(step["time/training_tflops"]) < 100
    assert "time/mfu" not in step  # nobody has said what this machine can do


def test_all_columns_of_seconds_sum_to_the_seconds_of_the_run(run):
    for name in ("ledger.csv", "metrics.csv"):
        rows = rows_of(run[0] / name)
        times = [
            {n: float(x) for n, x in row.items() if n.startswith("time/") and x} for row in rows
        ]
        totals = [row.pop("time/seconds") for row in times]
        sums = [sum(v for n, v in row.items() if n not in RATES) for row in times]
        if name == "metrics.csv":  # of each step alone
            sums = [sum(sums[: i + 1]) for i in range(len(sums))]
        assert sums == pytest.approx(totals, abs=1e-6)


def test_the_summary_says_what_pilots_cost_in_seconds(run):
    summary = json.loads((run[0] / "summary.json").read_text())
    spent = rows_of(run[0] / "ledger.csv")[-1]
    pilots = sum(float(v) for n, v in spent.items() if n.startswith("time/") and "/pilot" in n)
    whole = float(spent["time/seconds"])
    assert summary["pilot_seconds_share"] == pytest.approx(pilots / whole, rel=0.3)
    assert 0 < summary["pilot_seconds_share"] < 1 and 0 < summary["planning_share"] < 1


def test_the_validation_of_another_k_is_in_console_summary_and_best_checkpoint(run):
    run_dir, output = run
    assert "val avg@3" in output and "avg@8" not in output
    start, _ = rows_of(run_dir / "metrics.csv")
    shown = f"{100 * float(start['val/avg_at_3']):.1f}%"
    (line,) = [line for line in output.splitlines() if re.match(r" *0 ", line)]
    assert shown in line.split()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val_avg_at_3_first"] == float(start["val/avg_at_3"])
    assert "Validation avg@3 went from" in output
    assert (run_dir / "checkpoints" / "best.ckpt").exists()


def test_a_monitor_that_is_no_column_is_refused(tmp_path):
    told = warm.refused(tmp_path / "run", *GVM, "callbacks.checkpoint.monitor=val/avg_at_8")
    assert "callbacks.checkpoint.monitor=val/avg_at_8 is no column" in told
    assert "val/avg_at_3" in told and "val/pass_at_1" in told


class SleepyEngine:
    """Takes 20 ms a call, whatever is asked of it."""

    def generate(self, requests, params, version, on_response=None):
        time.sleep(0.02)
        responses = Responses(requests, on_response)
        for index, request in enumerate(requests):
            for k in range(len(request.seeds)):
                responses.add(index, k, Response(torch.tensor([5, 6]), torch.zeros(2), False, 0))
        return responses.groups()


def test_tokens_a_second_are_by_the_slowest_rank_over_all_rounds(monkeypatch):
    ledger, prompts = Ledger(), [Prompt(str(i), "q", "1", token_ids=(3, 4)) for i in range(2)]
    reward = lambda prompts, texts, truncated: [0.0] * len(prompts)  # noqa: E731
    drawer = Drawer(
        SleepyEngine(), reward, load_tokenizer("tiny"), SamplingParams(), ledger, Bars(False), 0
    )
    alone = drawer.draw(prompts, [2, 1], "train", 0)
    assert 0.02 <= alone.sampling_seconds < 1
    assert ledger.phases["sampling/train"] == pytest.approx(alone.sampling_seconds, abs=0.01)
    monkeypatch.setattr(
        draw, "all_gather", lambda mine: [mine, mine._replace(pieces=[], seconds=7.0)]
    )  # of a slower rank
    beside = drawer.draw(prompts, [2, 1], "train", 1)
    assert beside.sampling_seconds == 7
    assert draw.concatenate([alone, beside]).sampling_seconds == alone.sampling_seconds + 7
    assert ledger.phases["sampling/train"] < 1  # its own
