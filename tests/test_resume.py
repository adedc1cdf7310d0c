"""Runs stopped or killed again and again end as one left alone does. `python -m rlzoo.bench resume`
kills two processes under every strategy, twenty times each."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
import torch
from lightning import Callback, LightningModule
from safetensors.torch import load_file
from torch import Tensor

from rlzoo.bench.resume import (
    OPTIONS,
    WatchedRun,
    boundaries,
    compare,
    save_state,
)
from rlzoo.callbacks.preemption import Preempted
from rlzoo.callbacks.state import Run
from rlzoo.errors import UserError
from rlzoo.export import export
from rlzoo.launch.configuration import conf_dir
from rlzoo.launch.summary import read_metrics
from rlzoo.launch.training import train
from rlzoo.models.policy import load_policy
from tests.forked import SERVER, Ranks
from tests.test_runs import run

STEPS = 4
SINGLE = (*OPTIONS, f"limits.max_responses={STEPS * 48}", "trainer.devices=1", "logger=csv")
SHORT = (*OPTIONS, "limits.max_responses=192", "strategy=deepspeed_zero2")  # four rollout steps
TRIES = 3  # a kill that comes a moment late is tried again


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("resume") / "reference"
    run_to_the_end(run_dir, SHORT)
    return run_dir


class ForkedRun(WatchedRun):
    """With ranks that start as torchrun's do, their imports behind them."""

    def start(self, overrides: list[str], said: Path) -> Ranks:
        return Ranks("rlzoo.run", overrides, said)


def run_to_the_end(run_dir: Path, options: tuple[str, ...]) -> None:
    with ForkedRun(run_dir, *options) as run:
        run.finish()


def kill_when(run_dir: Path, condition: Callable[[WatchedRun], bool]) -> WatchedRun:
    with ForkedRun(run_dir, *SHORT, "ckpt_path=auto") as run:
        assert run.wait_for(lambda: condition(run)), "the run ended first"
        run.kill()
    return run


def in_a_second_save(run: WatchedRun) -> bool:
    half = run.phase == "checkpointing" and save_state(run.folder) == "half written"
    return half and boundaries(run.folder) >= 1


def mid_accumulation(run: WatchedRun) -> bool:
    return run.phase == "training" and run.microbatches % 2 == 1


@pytest.mark.deepspeed
def test_two_ranks_killed_in_the_save_and_mid_accumulation_end_as_two_left_alone(
    reference, tmp_path
):
    run_dir = tmp_path / "killed"
    for moment in (in_a_second_save, mid_accumulation):
        assert any(moment(kill_when(run_dir, moment)) for _ in range(TRIES)), moment.__name__
    run_to_the_end(run_dir, (*SHORT, "ckpt_path=auto"))
    assert compare(run_dir, reference) == []


@pytest.mark.deepspeed
def test_a_sharded_checkpoint_exports_and_starts_another_run(reference, tmp_path):
    last = reference / "checkpoints" / "last.ckpt"
    export(last.resolve(), tmp_path / "policy")
    expected = load_file(reference / "policy" / "model.safetensors")
    assert_equal(load_file(tmp_path / "policy" / "model.safetensors"), expected)
    started = dict(load_policy("tiny", init_from=str(last)).named_parameters())
    assert_equal({name: started[name] for name in expected}, expected)
    with pytest.raises(UserError, match="is not empty"):
        export(last.resolve(), tmp_path / "policy")


@pytest.mark.deepspeed
def test_other_processes_go_on_from_weights_data_and_counts_if_asked_to(reference, tmp_path):
    run_dir = tmp_path / "moved"
    shutil.copytree(reference, run_dir, symlinks=True)
    alone = (*OPTIONS, "strategy=auto", "trainer.devices=1", "ckpt_path=last")
    output = run(run_dir, *alone, "limits.max_responses=288", expected=2)
    assert "saved by 2 process(es) under DeepSpeed stage 2" in output and "resume=weights" in output
    run(run_dir, *alone, "limits.max_responses=288", "resume=weights")
    before, after = (read_metrics(d / "metrics.csv") for d in (reference, run_dir))
    assert [row["rollout_step"] for row in after] == [str(step) for step in range(7)]
    same = [name for name in before[0] if not name.startswith("time/")]
    assert [[row[name] for name in same] for row in after[: len(before)]] == [
        [row[name] for name in same] for row in before
    ]
    assert int(after[-1]["responses"]) == 288


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Told(Callback):
    """Tells a run to stop at each of its boundaries."""

    def on_boundary(self, run: Run, algo: LightningModule) -> None:
        run.told_to_stop = "SIGTERM"


def train_whole_and_in_pieces(folder: Path) -> None:
    """The same run twice, once stopped at every boundary."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        whole = hydra.compose("train", [*SINGLE, f"run_dir={folder / 'whole'}"])
        told = "+callbacks.told._target_=tests.test_resume.Told"
        pieces = hydra.compose(
            "train", [*SINGLE, f"run_dir={folder / 'pieces'}", "ckpt_path=auto", told]
        )
    train(whole)
    for _ in range(STEPS - 1):
        with pytest.raises(Preempted):
            train(pieces)
        gc.collect()  # what the exception held locks the run directory
    train(pieces)


def test_a_run_stopped_at_every_boundary_ends_as_one_left_alone(tmp_path):
    """Every resume is of a checkpoint that a resumed run has saved, inside epochs and between."""
    process = SERVER.Process(target=train_whole_and_in_pieces, args=(tmp_path,))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    assert compare(tmp_path / "pieces", tmp_path / "whole") == []
