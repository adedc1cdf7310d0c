"""Which process of a run this one is, and what all of them must agree on before they can talk."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlzoo.errors import UserError

STORE_TIMEOUT = 120.0  # seconds for torchrun's processes to meet


def is_first() -> bool:
    """Whether this process will be rank 0, from what its launcher says."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ and (name == "RANK" or in_slurm_step()):
            return os.environ[name] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def log_name() -> str:
    """File name of this process's log: log.txt of rank 0, log.rankN.txt or log.nodeN.rankM.txt."""
    if is_first():
        return "log.txt"
    if "RANK" in os.environ:
        return f"log.rank{os.environ['RANK']}.txt"
    if in_slurm_step():
        return f"log.rank{os.environ['SLURM_PROCID']}.txt"
    node, local = (os.environ.get(name, "0") for name in ("NODE_RANK", "LOCAL_RANK"))
    return f"log.node{node}.rank{local}.txt" if node != "0" else f"log.rank{local}.txt"


def in_slurm_step() -> bool:
    """Whether srun started this process."""
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ


def run_name() -> str:
    """Default name of a run's directory, the same on every rank: a date and time, or a SLURM job.

    A job that SLURM requeues keeps its name, and so finds its own run again.

    Raises:
        UserError: several machines without a launcher that they could agree through.
    """
    if "RLZOO_RUN_NAME" in os.environ:
        return os.environ["RLZOO_RUN_NAME"]
    name = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    if in_slurm_step():
        name = f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        name = agreed_through_store(name)
    elif "NODE_RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "NODE_RANK is set, so this run has several machines, which cannot agree on a run"
            " directory before they have met. Give all of them the same run_dir=DIRECTORY."
        )
    os.environ["RLZOO_RUN_NAME"] = name  # processes that Lightning starts from here inherit it
    return name


def agreed_through_store(name: str) -> str:
    """Rank 0's name, by the store through which torchrun's processes meet."""
    from torch.distributed import TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=STORE_TIMEOUT),
    )
    key = f"rlzoo/run_name/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_first():
        store.set(key, name)
    return store.get(key).decode()


def check_processes(trainer: DictConfig, multirun: bool) -> None:
    """What is known to go wrong with processes and devices, before any of them is started.

    Raises:
        UserError: devices that do not exist, a world of another size than the launcher's, or a
            sweep whose jobs would each start the whole sweep again.
    """
    import torch

    devices, nodes = trainer.devices, trainer.num_nodes
    for key, value in {"devices": devices, "num_nodes": nodes}.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"trainer.{key} must be a whole number, at least 1, got {value!r}.")
    accumulate = trainer.accumulate_grad_batches
    if not isinstance(accumulate, int) or accumulate < 1:
        raise UserError(
            "trainer.accumulate_grad_batches must be a whole number, at least 1, got"
            f" {accumulate!r}: microbatches per optimizer step and process."
        )
    if trainer.accelerator in ("gpu", "cuda") and torch.cuda.device_count() < devices:
        raise UserError(
            f"trainer.devices={devices} GPUs were asked for, but this machine has"
            f" {torch.cuda.device_count()}. Lower trainer.devices, or take trainer=cpu."
        )
    launched = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if launched is not None and int(launched) != devices * nodes:
        raise UserError(
            f"torchrun started {launched} processes, but trainer.devices={devices} times"
            f" trainer.num_nodes={nodes} is {devices * nodes}. Set them to torchrun's"
            " --nproc-per-node and --nnodes."
        )
    if multirun and devices * nodes > 1 and launched is None and not in_slurm_step():
        raise UserError(
            "--multirun with several processes would start the whole sweep again in each of them."
            " Start one job at a time (experiments/study.py does), or sweep over SLURM jobs."
        )


def register() -> None:
    """Makes ${run_name:} known to OmegaConf."""
    if not OmegaConf.has_resolver("run_name"):
        OmegaConf.register_new_resolver("run_name", lambda *_: run_name())


def cluster_plugins() -> list[Any]:
    """Lightning's SLURM environment without its own requeueing, which saves inside a rollout step."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
