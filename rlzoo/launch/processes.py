"""Which process of a run this one is, and what all of them must agree on before they can talk."""

from __future__ import annotations

import os
import socket
from datetime import datetime, timedelta
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlzoo.errors import UserError

STORE_TIMEOUT = 120.0  # seconds for torchrun's processes to meet


def is_first() -> bool:
    """Whether this process will be rank 0, from what its launcher says."""
    if (rank := launchers_rank()) is not None:
        return rank == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def launchers_rank() -> str | None:
    """The rank that torchrun or SLURM gave this process; None under Lightning's own launcher."""
    if "RANK" in os.environ:
        return os.environ["RANK"]
    return os.environ["SLURM_PROCID"] if in_slurm_step() else None


def log_name() -> str:
    """File name of this process's log: log.txt of rank 0, log.rankN.txt or log.nodeN.rankM.txt."""
    if is_first():
        return "log.txt"
    if (rank := launchers_rank()) is not None:
        return f"log.rank{rank}.txt"
    node, local = (os.environ.get(name, "0") for name in ("NODE_RANK", "LOCAL_RANK"))
    return f"log.node{node}.rank{local}.txt" if node != "0" else f"log.rank{local}.txt"


def in_slurm_step() -> bool:
    """Whether srun started this process, and not only the shell that it was typed into."""
    return in_slurm_job() and "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ


def in_slurm_job() -> bool:
    """Whether SLURM says how many processes there are; Lightning asks the same."""
    by_hand = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not by_hand


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_name() -> str:
    """Default name of a run's directory, the same on every rank: a date and time, or a SLURM job.

    A job that SLURM requeues keeps its name, and so do processes that torchrun starts once more:
    they find their own run again.

    Raises:
        UserError: several machines without a launcher that they could agree through.
    """
    if "RLZOO_RUN_NAME" in os.environ:
        return os.environ["RLZOO_RUN_NAME"]
    name = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    if in_slurm_step():
        name = f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"
    elif under_torchrun():
        name = agreed_through_store(name)
    elif "NODE_RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "NODE_RANK is set, so this run has several machines, which cannot agree on a run"
            " directory before they have met. Give all of them the same run_dir=DIRECTORY."
        )
    os.environ["RLZOO_RUN_NAME"] = name  # processes that Lightning starts from here inherit it
    return name


def agreed_through_store(name: str) -> str:
    """Rank 0's first name, by the store in torchrun's agent, which outlives the processes.

    Raises:
        UserError: the agents share no store with the processes.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in __all__

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise UserError(
            "torchrun was told not to share its store, so that the processes cannot agree on a run"
            " directory. Give run_dir=DIRECTORY."
        )
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=STORE_TIMEOUT),
    )
    key = "rlzoo/run_name"
    if is_first():
        store.compare_set(key, "", name)  # sets what is not set yet
    return store.get(key).decode()


def check_processes(trainer: DictConfig, sweep: bool) -> None:
    """What is known to go wrong with processes and devices, before any of them is started.

    Args:
        trainer: the configuration's, whose values `check_settings` has seen.
        sweep: whether this process runs the jobs of a sweep, one after the other.

    Raises:
        UserError: devices that do not exist or that torch cannot use, a world of another size than
            the launcher's, a port in use, or a sweep whose jobs would each start the whole sweep
            again.
    """
    import torch

    from rlzoo.launch.devices import why_no_cuda

    devices, size = trainer.devices, trainer.devices * trainer.num_nodes
    gpus = trainer.accelerator in ("gpu", "cuda")
    if gpus and (reason := why_no_cuda()) is not None:
        raise UserError(
            f"trainer.accelerator={trainer.accelerator} cannot be: {reason} Or take trainer=cpu."
        )
    if gpus and torch.cuda.device_count() < devices:
        raise UserError(
            f"trainer.devices={devices} GPUs were asked for, but this process sees"
            f" {torch.cuda.device_count()}. Lower trainer.devices, or take trainer=cpu. (Under"
            " SLURM every process must see all GPUs of its machine: --gpus-per-node, without"
            " --gpus-per-task.)"
        )
    if sweep and size > 1:
        raise UserError(
            "--multirun with several processes would start the whole sweep again in each of them."
            " Start one job at a time (experiments/study.py does), or let submitit make a SLURM job"
            " of each: docs/launching.md."
        )
    check_launcher(devices, trainer.num_nodes)
    if size > 1 and is_first() and not under_torchrun():
        check_port()


def check_launcher(devices: int, nodes: int) -> None:
    """Whether the launcher, if it is not Lightning's own, started the processes asked for.

    Raises:
        UserError: it did not.
    """
    asked = f"trainer.devices={devices} times trainer.num_nodes={nodes}"
    if under_torchrun():
        here, everywhere = (int(os.environ[k]) for k in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        if (here, everywhere) != (devices, devices * nodes):
            raise UserError(
                f"torchrun started {everywhere} processes, {here} of them on this machine, but"
                f" {asked} is {devices * nodes}, {devices} on each. Set them to torchrun's"
                " --nproc-per-node and --nnodes."
            )
    elif in_slurm_job():
        tasks = int(os.environ["SLURM_NTASKS"])
        here = int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
        machines = int(os.environ.get("SLURM_NNODES", 1))
        if (tasks, here, machines) != (devices * nodes, devices, nodes):
            raise UserError(
                f"SLURM has {tasks} tasks, {here} on each of {machines} machines, but {asked} is"
                f" {devices * nodes}. Take trainer=slurm, and give sbatch or srun --nodes and"
                " --ntasks-per-node (not --ntasks)."
            )
        if tasks > 1 and not in_slurm_step():
            raise UserError(
                f"This SLURM job has {tasks} tasks, but this is not one of them: put srun before"
                " the command."
            )


def check_port() -> None:
    """Whether the port is free at which the other processes will look for this one.

    Raises:
        UserError: it is not. (They would wait for half an hour.)
    """
    port = os.environ.get("MASTER_PORT")
    if port is None and in_slurm_job():
        port = str(15000 + int(os.environ["SLURM_JOB_ID"][-4:]))  # Lightning's choice
    if port is None:
        return  # Lightning looks for a free one
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("", int(port)))
        except OSError as error:
            raise UserError(port_in_use(port)) from error


def port_in_use(port: str) -> str:
    return (
        f"The port {port}, at which the processes of this run would meet, is in use by another"
        " program. Set MASTER_PORT to a free one (torchrun: --master-port)."
    )


def register() -> None:
    """Makes ${run_name:} known to OmegaConf."""
    if not OmegaConf.has_resolver("run_name"):
        OmegaConf.register_new_resolver("run_name", lambda *_: run_name())


def cluster_plugins() -> list[Any]:
    """Lightning's SLURM environment less its own requeueing, which saves inside a rollout step."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if under_torchrun() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]
