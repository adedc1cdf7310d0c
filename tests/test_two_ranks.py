"""Two processes over gloo train as one does: every algorithm, from scoring to averaged gradients,
and what is logged of them, a rank without data included."""

import dataclasses
import math
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlzoo.algos import RAFT, PolicyAlgorithm
from rlzoo.callbacks import RankWatch, rank_watch
from rlzoo.learning.losses import LossOutput
from rlzoo.ranks.exchange import all_gather
from rlzoo.report.ledger import Ledger
from rlzoo.types import RolloutBatch, Rollouts
from tests import forked
from tests.recorded import recorded_rollouts
from tests.test_sft import rank_gradient, rank_loss
from tests.zoo import NAMES, build, gradient

EVERY = [(name, {}) for name in NAMES]
EVERY += [("grpo", {"kl_coef": 0.2}), ("reinforce", {"kl_coef": 0.2, "kl_in": "reward"})]
EVERY += [("raft", {"overlong_filter": True, "rejected": "drop"}), ("grpo", {"tis_cap": 2.0})]
IDS = [name for name, _ in EVERY]
LONE = ("raft", {"rejected": "drop"})  # on rollouts of which one trains: a rank has none


def step() -> Rollouts:
    rollouts = recorded_rollouts((3, 1, 4, 2))
    rollouts.rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    rollouts.truncated[4] = True
    return rollouts


def made(name: str, changes: dict) -> PolicyAlgorithm:
    algo = build(name, **changes)
    for parameter in (p for model in algo.side_models for p in model.parameters()):
        parameter.data *= 0.9  # a reference that differs
    return algo


def gradients() -> list[torch.Tensor]:
    """Of every algorithm on the same rollouts, in two microbatches."""
    found = [gradient(made(name, changes), step(), parts=2) for name, changes in EVERY]
    name, changes = LONE
    lonely = dataclasses.replace(step(), rewards=torch.tensor([1.0] + [0.0] * 9))
    return [*found, gradient(made(name, changes), lonely), rank_gradient()]


class Talkative(RAFT):
    """A loss from outside that reports other names for other microbatches, and by rank."""

    def policy_loss(self, logprobs: torch.Tensor, batch: RolloutBatch) -> LossOutput:
        loss_sum, _ = super().policy_loss(logprobs, batch)
        rows = int(batch.response_mask.any(-1).sum())
        tokens = batch.weights.sum()
        return LossOutput(loss_sum, {f"microbatches_of_{rows}": tokens, "z": 2 * tokens})


def logged() -> dict[str, dict[str, float]]:
    """What each algorithm logs of a rollout step in which one unit trains, so that rank 1 has
    nothing but blank microbatches; and of one in which ranks and microbatches have other names."""
    found = {}
    for name in NAMES:
        lonely = recorded_rollouts((2,) if name == "iterative_dpo" else (1,))
        lonely.rewards = torch.tensor([1.0, 0.0])[: len(lonely)]
        algo = build(name)
        gradient(algo, lonely, parts=2)
        found[name] = algo.means.compute() | algo.gap()
    algo = build("raft")
    algo.__class__ = Talkative
    gradient(algo, dataclasses.replace(step(), rewards=torch.tensor([1.0] * 3 + [0.0] * 7)), 2)
    found["talkative"] = algo.means.compute()
    found["sft"] = {"val/loss": rank_loss()}
    return found


def stalled(rank: int) -> tuple[list[str], list[str]]:
    """What the watch says, and why it would end the run, where rank 0 waits in an exchange and
    rank 1 hangs elsewhere for longer than is allowed."""
    said: list[str] = []
    ended: list[str] = []
    rank_watch.BEAT, rank_watch.say = 0.1, said.append
    watch = RankWatch(stall=0.5)
    watch.stop = ended.append
    watch.begin()
    assert 50 < watch.limit < 60  # of the group's time-out
    watch.limit = 1.5
    if rank == 1:
        with Ledger().phase("scoring"):
            time.sleep(3.0)
    meet()
    watch.close("done")
    all_gather("done")
    return said, ended


def meet() -> None:
    all_gather(None)


def compute_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    averaged = gradients()
    for tensor in averaged:  # as a data-parallel strategy does
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        tensor /= 2
    torch.save((averaged, logged(), stalled(rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """By rank, the averaged gradients and what was logged."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    forked.on_ranks(compute_on_a_rank, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> list[torch.Tensor]:
    return gradients()


@pytest.mark.parametrize("case", range(len(EVERY) + 2), ids=[*IDS, "lone", "sft"])
def test_two_ranks_average_to_the_gradient_of_one(case, ranks, alone):
    expected = alone[case]
    assert expected.norm() > 1e-4
    for averaged, *_ in ranks:
        assert (averaged[case] - expected).norm() / expected.norm() < 1e-5


def test_a_rank_without_data_logs_what_one_process_alone_does(ranks):
    """What the ranks exchange while they log does not depend on what they hold."""
    expected = logged()
    talkative = {*(f"microbatches_of_{n}" for n in (1, 2, 3)), "z", "entropy", "loss"}
    assert set(expected["talkative"]) - talkative == set()
    for _, found, _ in ranks:
        assert "z" in found["talkative"] and found["talkative"]["z"] == pytest.approx(2.0)
        for name in [*NAMES, "sft"]:
            assert expected[name].keys() == found[name].keys()
            for key, value in expected[name].items():
                same = found[name][key] == pytest.approx(value, rel=1e-5, abs=1e-6)
                assert same or (math.isnan(value) and math.isnan(found[name][key])), (name, key)
    both = [{k: v for k, v in found["talkative"].items() if v == v} for _, found, _ in ranks]
    assert both[0] == both[1]


def test_a_stall_says_what_it_waits_for_and_on_which_rank(ranks):
    """All are alive, so that nobody is missed, and would wait for half an hour."""
    (*_, (said, ended)), (*_, (nothing, ended_too)) = ranks
    where = (
        r"rank 0 \(.*\) waits for the others in meet \(exchange \d+, between phases\) since \d+ s;"
    )
    where += r" rank 1 \(.*\) in phase scoring since \d+ s\."
    assert said and not nothing  # rank 0 speaks for all
    assert re.fullmatch(rf"no rank has moved on for \d+ s: {where}", said[0])
    for reasons in (ended, ended_too):
        assert reasons and re.fullmatch(rf"No rank has moved on for \d+ s: {where}", reasons[0])
