"""A run of two processes that is told to stop, or loses one of them."""

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from rlzoo.launch.summary import read_metrics
from tests.test_runs import SMALL, assert_same_run, finish, run, start, wait_for

TWO_RANKS = (
    *(option for option in SMALL if not option.startswith("limits")),
    "limits.max_responses=192",  # four rollout steps
    "trainer.devices=2",
    "strategy=ddp",
    "trainer.accumulate_grad_batches=2",
)
BAR = 60.0  # seconds that a rank may outlive another one


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("ranks") / "reference"
    run(run_dir, *TWO_RANKS)
    return run_dir


def test_two_ranks_told_to_stop_save_and_the_resumed_run_is_the_same(reference, tmp_path):
    run_dir = tmp_path / "told"
    process = start(run_dir, *TWO_RANKS)
    wait_for(run_dir / "rollouts" / "step_000000.parquet", process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, expected=143)
    assert "SIGTERM: saved. Go on with" in output and "ckpt_path=last" in output
    assert "Traceback" not in output
    ended = read_metrics(run_dir / "metrics.csv")
    step = int(ended[-1]["rollout_step"])
    assert (run_dir / "checkpoints" / "last.ckpt").resolve().name == f"step_{step:06d}.ckpt"
    assert step < 4
    run(run_dir, *TWO_RANKS, "ckpt_path=last")
    assert_same_run(run_dir, reference)  # to the row: stopping has validated nothing


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_one_which_names_it(victim, tmp_path):
    run_dir = tmp_path / "killed"
    process = start(run_dir, *TWO_RANKS)
    wait_for(run_dir / "rollouts" / "step_000000.parquet", process)
    ranks = [psutil.Process(process.pid), launched_by(process)]
    ranks[victim].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    output, _ = process.communicate(timeout=BAR)  # until the last of them closes its output
    psutil.wait_procs(ranks, timeout=BAR)
    assert time.monotonic() - killed_at < BAR
    assert not any(rank.is_running() for rank in ranks)
    assert process.returncode == (70 if victim else -signal.SIGKILL)
    assert re.search(rf"rlzoo: rank {victim} \(.*, process {ranks[victim].pid}\) is gone\.", output)


def launched_by(process: subprocess.Popen) -> psutil.Process:
    """Rank 1, which Lightning started from rank 0."""
    (child,) = [
        child for child in psutil.Process(process.pid).children() if "rlzoo.run" in child.cmdline()
    ]
    return child
