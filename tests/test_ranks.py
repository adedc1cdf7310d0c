"""What a process concludes from its launcher's variables, and launches that cannot work."""

import json
import os
import socket
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf
from torch.distributed import TCPStore

from rlzoo.errors import UserError
from rlzoo.launch import processes as ranks
from rlzoo.launch.processes import check_processes, cluster_plugins, is_first, log_name, run_name
from tests.forked import Program, Ranks

LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "MASTER_", "RLZOO_RUN_NAME", "NODE_RANK", "GROUP_RANK")
LAUNCHERS += ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")

JOB = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
JOB |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0"}  # a batch script is a PROCID too
TASK = JOB | {"SLURM_STEP_ID": "7", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
SHELL = {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"}  # srun --pty bash
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RLZOO_RUN_NAME", "")  # so that what a test sets is taken back
    monkeypatch.delenv("RLZOO_RUN_NAME")


def launched(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables, log",
    [
        ({}, "log.txt"),
        ({"LOCAL_RANK": "1"}, "log.rank1.txt"),
        ({"NODE_RANK": "1"}, "log.node1.rank0.txt"),
        ({"NODE_RANK": "1", "LOCAL_RANK": "3"}, "log.node1.rank3.txt"),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, "log.txt"),
        (TORCHRUN | {"RANK": "9", "LOCAL_RANK": "1"}, "log.rank9.txt"),
        (TASK, "log.rank1.txt"),
        (TASK | {"SLURM_PROCID": "0"}, "log.txt"),
        (TASK | TORCHRUN | {"RANK": "3"}, "log.rank3.txt"),  # srun torchrun
        (TASK | TORCHRUN | {"RANK": "0"}, "log.txt"),
        (TASK | SHELL | {"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, "log.rank1.txt"),
    ],
)
def test_every_process_has_a_log_of_its_own_and_rank_0_has_log_txt(monkeypatch, variables, log):
    launched(monkeypatch, variables)
    assert log_name() == log
    assert is_first() == (log == "log.txt")


def test_lightning_takes_the_processes_of_srun_and_leaves_the_signal_to_rlzoo(monkeypatch):
    assert cluster_plugins() == []
    launched(monkeypatch, TASK)
    (environment,) = cluster_plugins()
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    assert (environment.world_size(), environment.global_rank()) == (2, 1)
    launched(monkeypatch, TORCHRUN)  # srun starts torchrun, torchrun starts this
    assert cluster_plugins() == []


def test_a_slurm_job_names_the_run_after_itself(monkeypatch):
    launched(monkeypatch, TASK)
    assert run_name() == "slurm-1234-7"


def test_a_shell_in_a_slurm_job_names_runs_by_the_time(monkeypatch):
    launched(monkeypatch, TASK | SHELL)
    assert not run_name().startswith("slurm")


def test_torchruns_processes_take_the_name_of_rank_0_and_keep_it_when_started_anew(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as the agent's
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    here |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    names = []
    for rank, time in (("0", "first"), ("1", "second"), ("0", "third")):
        launched(monkeypatch, TORCHRUN | here | {"RANK": rank})
        monkeypatch.setattr(ranks, "datetime", Clock(time))
        names.append(run_name())
        del os.environ["RLZOO_RUN_NAME"]
    assert names == ["first"] * 3


class Clock:
    def __init__(self, time: str) -> None:
        self.time = time

    def now(self) -> "Clock":
        return self

    def strftime(self, pattern: str) -> str:
        return self.time


@pytest.mark.parametrize(
    "variables, devices, nodes, words",
    [
        (TORCHRUN, 1, 1, ["torchrun started 2", "devices=1", "--nproc-per-node"]),
        (TORCHRUN, 1, 2, ["2 of them on this machine", "num_nodes=2"]),
        (TASK, 2, 1, ["SLURM has 2 tasks, 1 on each of 2", "devices=2", "trainer=slurm"]),
        (JOB, 1, 2, ["2 tasks", "put srun before"]),
        (JOB | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, 2, 1,
         ["SLURM has 1 tasks", "devices=2"]),
        ({k: v for k, v in TASK.items() if "PER_NODE" not in k} | {"SLURM_NNODES": "1"}, 2, 1,
         ["--ntasks-per-node (not --ntasks)"]),
    ],
)  # fmt: skip
def test_a_world_of_another_size_than_the_launchers_is_refused(
    monkeypatch, variables, devices, nodes, words
):
    launched(monkeypatch, variables)
    trainer = {"devices": devices, "num_nodes": nodes}
    trainer["accelerator"] = "cpu"
    with pytest.raises(UserError) as caught:
        check_processes(OmegaConf.create(trainer), sweep=False)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("variables", [TORCHRUN, TASK])
def test_a_world_of_the_launchers_size_is_accepted(monkeypatch, variables):
    launched(monkeypatch, variables)
    devices = 2 if variables is TORCHRUN else 1
    trainer = {"devices": devices, "num_nodes": 2 // devices}
    check_processes(OmegaConf.create(trainer | {"accelerator": "cpu"}), sweep=False)


def rlzoo(*arguments: str, cwd: Path, **variables: str) -> tuple[int, str]:
    """The exit code of a program in a process of its own, and what it said."""
    environment = os.environ | variables
    program = Program("rlzoo.run", arguments, cwd / "said.txt", cwd=cwd, variables=environment)
    output, _ = program.communicate(timeout=240)
    return program.returncode, output


def refused(*arguments: str, cwd: Path, **variables: str) -> str:
    code, output = rlzoo(*arguments, cwd=cwd, **variables)
    assert code == 2 and "Traceback" not in output, output
    assert not list(cwd.rglob("config.yaml"))  # nothing was begun
    return output


def test_a_port_that_another_program_listens_on_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        output = refused("trainer.devices=2", "strategy=ddp", cwd=tmp_path, MASTER_PORT=port)
    assert f"The port {port}" in output and "Set MASTER_PORT to a free one" in output


def test_where_there_are_no_gpus_it_is_said_why(tmp_path):
    output = refused("trainer=gpu", cwd=tmp_path)
    assert "trainer.accelerator=gpu cannot be" in output and "trainer=cpu" in output


def test_a_sweep_of_runs_with_several_local_processes_is_refused(tmp_path):
    output = refused("--multirun", "seed=0,1", "trainer.devices=2", cwd=tmp_path)
    assert "--multirun with several processes" in output and "submitit" in output


def test_several_machines_under_lightnings_own_launcher_must_be_given_a_directory(tmp_path):
    output = refused("trainer.num_nodes=2", cwd=tmp_path, NODE_RANK="0", MASTER_ADDR="127.0.0.1")
    assert "run_dir=DIRECTORY" in output


def test_torchruns_count_of_processes_is_compared_with_the_configurations(tmp_path):
    ranks = Ranks("rlzoo.run", [f"run_dir={tmp_path / 'run'}"], tmp_path / "said.txt")
    assert ranks.wait(timeout=240) == 2
    said = "rlzoo: torchrun started 2 processes, 2 of them on this machine"
    assert ranks.communicate()[0].count(said) == 2


def test_a_sweep_of_runs_of_one_process_gives_each_a_directory(tmp_path):
    small = ("num_threads=1", "data.num_train=16", "data.num_val=2", "sampler=uniform")
    small += ("datamodule.prompts_per_epoch=4", "datamodule.responses_per_prompt=4")
    small += ("datamodule.responses_per_step=16", "limits.max_responses=16")
    code, output = rlzoo("--multirun", "seed=0,1", *small, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert code == 0, output
    jobs = sorted((tmp_path / "sweep").glob("*seed=*"))
    assert [f"seed: {i}\n" in (job / "config.yaml").read_text() for i, job in enumerate(jobs)] == [
        True,
        True,
    ]
    for job in jobs:
        assert json.loads((job / "summary.json").read_text())["responses"] == 16
        assert (job / "log.txt").read_text().count("engine=auto takes") == 1
