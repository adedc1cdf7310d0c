"""Benches that nothing else calls, in small: they run, and the last line has what was promised."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlzoo.bench import _runs, mfu, old_logprobs, peak, sampling
from tests import warm


def figures(bench, capsys, *arguments: str) -> dict[str, object]:
    bench.main(list(arguments))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_sampling(capsys):
    sizes = ("--shape", "1m", "--responses", "16", "--longest", "12", "--repeats", "1")
    found = figures(sampling, capsys, *sizes)
    assert found["tokens_per_second_ratio"] > 0 and 0 < found["outside_share"] < 1
    assert 0 < found["peak_bytes"] and 0 < found["generate_peak_bytes"]
    assert {"step_ms", "trunk_ms", "head_ms", "draw_ms", "rest_ms"} < set(found)


def test_peak(capsys):
    """Of a model so small that the forecast says little; the bench itself is of 25M parameters."""
    found = figures(peak, capsys, "--shape", "1m", "--tokens", "1024", "--cases", "float32")
    assert set(found["peak_over_forecast"]) == {"float32"}
    assert 0.5 < found["worst"] < 1.5


def test_mfu_is_of_the_operations_of_a_step_over_those_of_products_beside_it(capsys, monkeypatch):
    class Worker:
        """In place of a process with a run in it, which takes ten seconds."""

        def __init__(self, *_: object) -> None:
            self.steps: list[dict[str, float]] = []

        def ready(self) -> dict[str, int]:
            return {"threads": 1}

        def step(self) -> None:
            self.steps.append({"seconds/update": 0.5})

        def close(self) -> None:
            pass

    monkeypatch.setattr(mfu, "Worker", Worker)
    monkeypatch.setattr(mfu, "SIDE", 256)
    sizes = ("--shape", "1m", "--responses", "8", "--limit", "8", "--repeats", "2")
    found = figures(mfu, capsys, *sizes, "--dtypes", "float32")
    step = mfu.step_of(Namespace(shape="1m", responses=8, limit=8), bf16=False)
    assert found["gflops_float32"] == pytest.approx(mfu.operations(step) / 0.5e9, abs=1e-3)
    assert 0 < found["mfu_float32_low"] <= found["mfu_float32"] <= found["mfu_float32_high"]
    assert found["peak_gflops_float32"] > 0


def test_old_logprobs(capsys, monkeypatch):
    def run(command, **_):
        (_, _, _, folder, *overrides) = command
        outcome = warm.run(Path(folder.removeprefix("run_dir=")), *overrides)
        return SimpleNamespace(returncode=outcome.code, stdout=outcome.output)

    monkeypatch.setattr(_runs, "subprocess", SimpleNamespace(run=run, PIPE=None, STDOUT=None))
    monkeypatch.setattr(old_logprobs, "STEPS", 2)
    monkeypatch.setitem(old_logprobs.RESPONSES, "tiny", 8)
    found = figures(old_logprobs, capsys, "--policies", "tiny", "--repeats", "1", "--updates", "2")
    assert found["tiny_step_ratio"] > 0 and found["tiny_scoring_seconds"] > 0
    assert {"tiny_training_ratio", "tiny_saved_seconds"} < set(found)
