"""Two processes over gloo train as one does: every algorithm, from scoring to averaged gradients."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlzoo.algos import PolicyAlgorithm
from rlzoo.types import Rollouts
from tests.recorded import recorded_rollouts
from tests.zoo import NAMES, build, gradient

EVERY = [(name, {}) for name in NAMES]
EVERY += [("grpo", {"kl_coef": 0.2}), ("reinforce", {"kl_coef": 0.2, "kl_in": "reward"})]
EVERY += [("raft", {"overlong_filter": True, "rejected": "drop"}), ("grpo", {"tis_cap": 2.0})]
LONE = ("raft", {"rejected": "drop"})  # on rollouts of which one trains: a rank has none


def step() -> Rollouts:
    rollouts = recorded_rollouts((3, 1, 4, 2))
    rollouts.rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    rollouts.truncated[4] = True
    return rollouts


def made(name: str, changes: dict) -> PolicyAlgorithm:
    algo = build(name, **changes)
    for parameter in (p for model in algo._reference for p in model.parameters()):
        parameter.data *= 0.9  # a reference that differs
    return algo


def gradients() -> list[torch.Tensor]:
    """Of every algorithm on the same rollouts, in two microbatches."""
    found = [gradient(made(name, changes), step(), accumulate=2) for name, changes in EVERY]
    name, changes = LONE
    lonely = dataclasses.replace(step(), rewards=torch.tensor([1.0] + [0.0] * 9))
    return [*found, gradient(made(name, changes), lonely)]


def compute_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    averaged = gradients()
    for tensor in averaged:  # as a data-parallel strategy does
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        tensor /= 2
    torch.save(averaged, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> list[list[torch.Tensor]]:
    """By rank, the averaged gradients."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.start_processes(compute_on_a_rank, (str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> list[torch.Tensor]:
    return gradients()


@pytest.mark.parametrize("case", range(len(EVERY) + 1), ids=[n for n, _ in EVERY] + ["lone"])
def test_two_ranks_average_to_the_gradient_of_one(case, averaged, alone):
    expected = alone[case]
    assert expected.norm() > 1e-4
    for rank in range(2):
        assert (averaged[rank][case] - expected).norm() / expected.norm() < 1e-5
