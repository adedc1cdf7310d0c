"""A run of two processes that is told to stop, or loses one of them."""

import re
import signal
from pathlib import Path

import psutil
import pytest

from rlzoo.launch.summary import read_metrics
from tests.forked import Program, Ranks
from tests.test_runs import SMALL, assert_same_run, finish, run, start, wait_for

TWO_RANKS = (
    *(option for option in SMALL if not option.startswith("limits")),
    "limits.max_responses=192",  # four rollout steps
    "trainer.devices=2",
    "strategy=ddp",
    "algo.tokens_per_microbatch=400",
)
BAR = 60.0  # seconds that a rank may outlive another one


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks, uninterrupted, of which Lightning started the second."""
    run_dir = tmp_path_factory.mktemp("ranks") / "reference"
    finish(start(run_dir, *TWO_RANKS))
    return run_dir


def test_two_ranks_told_to_stop_save_and_the_resumed_run_is_the_same(reference, tmp_path):
    run_dir = tmp_path / "told"
    ranks = Ranks("rlzoo.run", [f"run_dir={run_dir}", *TWO_RANKS], tmp_path / "told.txt")
    wait_for(run_dir / "rollouts" / "step_000000.parquet", ranks)
    ranks.programs[0].send_signal(signal.SIGTERM)  # which has to tell the other one
    output = finish(ranks, expected=143)
    assert "SIGTERM: saved. Go on with" in output and "ckpt_path=last" in output
    assert "Traceback" not in output
    ended = read_metrics(run_dir / "metrics.csv")
    step = int(ended[-1]["rollout_step"])
    assert (run_dir / "checkpoints" / "last.ckpt").resolve().name == f"step_{step:06d}.ckpt"
    assert step < 4
    run(run_dir, *TWO_RANKS, "ckpt_path=last")
    assert_same_run(run_dir, reference)  # to the row: stopping has validated nothing


def test_when_the_first_rank_is_killed_the_one_it_launched_ends_and_names_it(tmp_path):
    run_dir = tmp_path / "killed"
    process = start(run_dir, *TWO_RANKS)
    wait_for(run_dir / "rollouts" / "step_000000.parquet", process)
    ranks = [psutil.Process(process.pid), launched_by(process)]
    process.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(ranks, timeout=BAR)
    assert not left
    assert re.search(
        rf"rlzoo: rank 0 \(.*, process {process.pid}\) is gone\.", process.said.read_text()
    )


def test_when_another_rank_is_killed_the_first_ends_and_names_it(tmp_path):
    run_dir = tmp_path / "killed"
    ranks = Ranks("rlzoo.run", [f"run_dir={run_dir}", *TWO_RANKS], tmp_path / "killed.txt")
    wait_for(run_dir / "rollouts" / "step_000000.parquet", ranks)
    first, victim = ranks.programs
    victim.send_signal(signal.SIGKILL)
    assert first.wait(timeout=BAR) == 70
    said = first.said.read_text()
    assert re.search(rf"rlzoo: rank 1 \(.*, process {victim.pid}\) is gone\.", said)


@pytest.mark.slow
def test_when_the_rank_that_it_launched_is_killed_the_first_ends_and_names_it(tmp_path):
    """Lightning looks at it, too, every five seconds, and would end without a word."""
    process = start(tmp_path / "killed", *TWO_RANKS)
    wait_for(tmp_path / "killed" / "rollouts" / "step_000000.parquet", process)
    victim = launched_by(process)
    victim.send_signal(signal.SIGKILL)
    assert process.wait(timeout=BAR) == 70
    assert re.search(rf"rank 1 \(.*, process {victim.pid}\) is gone\.", process.said.read_text())


def launched_by(process: Program) -> psutil.Process:
    """Rank 1, which Lightning started from rank 0."""
    (child,) = [
        child for child in psutil.Process(process.pid).children() if "rlzoo.run" in child.cmdline()
    ]
    return child
