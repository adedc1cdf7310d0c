"""Processes with the variables that srun gives its tasks, and a stand-in for scontrol.

There is no SLURM here: what is tested is what rlzoo and Lightning make of its environment and of
its signal, which slurmstepd sends to every process of a step.
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from rlzoo.bench._equal import equal_but_time
from tests.multinode.conftest import SMALL
from tests.multinode.hosts import PATIENCE, Program, finish, start_rank, stop

ON_CPUS = ("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.deterministic=true")


def free_job() -> str:
    """A job's number whose port, by Lightning's rule, is free."""
    for last in range(1000, 10_000):
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", 15_000 + last)):
                return f"12{last}"
    raise AssertionError("all ports are in use")


def srun(job: str, cwd: Path, bin_dir: Path, *overrides: str) -> list[Program]:
    """Two nodes with a task each, with the variables of `srun --nodes=2 --ntasks-per-node=1`."""
    variables = {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": "rlzoo",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1,127.0.0.2",
        "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2",
        "SLURM_LOCALID": "0",
    }
    return [
        start_rank(
            ("trainer=slurm", *ON_CPUS, *overrides),
            cwd / f"terminal{task}.txt",
            **variables,
            SLURM_PROCID=str(task),
            SLURM_NODEID=str(task),
        )
        for task in range(2)
    ]


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """Holds a scontrol that writes down what it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    (folder / "scontrol").chmod(0o755)
    return folder


def wait_until_it_draws(program: Program) -> None:
    deadline = time.monotonic() + PATIENCE
    while "Engine and trainer agree" not in program.said():  # in the first rollout step
        assert program.process.poll() is None and time.monotonic() < deadline, program.said()
        time.sleep(0.05)


def test_a_job_told_that_its_time_is_up_saves_requeues_and_goes_on(
    two_local_ranks, bin_dir, tmp_path
):
    job = free_job()
    overrides = (*SMALL, "strategy=ddp", "ckpt_path=auto")
    tasks = srun(job, tmp_path, bin_dir, *overrides)
    try:
        wait_until_it_draws(tasks[0])
    except BaseException:
        stop(tasks)
        raise
    for task in tasks:
        os.killpg(task.process.pid, signal.SIGUSR1)
    outputs = finish(tasks, expected=143)
    assert "SIGUSR1: saved." in outputs[0] and "Traceback" not in "".join(outputs)
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {job}\n"
    run_dir = tmp_path / "outputs" / f"slurm-{job}-0"
    saved = (run_dir / "checkpoints" / "last.ckpt").resolve().name
    assert saved == "step_000001.ckpt"

    finish(srun(job, tmp_path, bin_dir, *overrides))  # as SLURM starts a requeued job
    assert os.listdir(tmp_path / "outputs") == [run_dir.name]
    assert equal_but_time(run_dir / "metrics.csv", two_local_ranks("ddp") / "metrics.csv") == []
    assert sorted(path.name for path in run_dir.glob("log*.txt")) == ["log.rank1.txt", "log.txt"]
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {job}\n"
