import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.learning.metrics import PassMetrics, WeightedMeans
from tests import forked

KS = (1, 2, 4, 8)


def ragged_groups(seed: int = 0, num_prompts: int = 30) -> tuple[Tensor, Tensor]:
    """Rewards of 0 and 1 [N] and group ids [N], groups of 1 to 9 responses, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 10, (num_prompts,), generator=generator)
    group_ids = torch.arange(num_prompts).repeat_interleave(sizes)
    rewards = (torch.rand(len(group_ids), generator=generator) < 0.3).float()
    order = torch.randperm(len(group_ids), generator=generator)
    return rewards[order], group_ids[order]


def brute_force(rewards: Tensor, group_ids: Tensor) -> dict[str, float]:
    """The same figures by looking at every subset of every group."""
    groups = [rewards[group_ids == g].tolist() for g in group_ids.unique()]
    averages = torch.tensor([sum(group) / len(group) for group in groups], dtype=torch.float64)
    expected = {
        "avg_at_n": averages.mean().item(),
        "avg_stderr": averages.std().item() / math.sqrt(len(groups)),
        "num_prompts": len(groups),
    }
    for k in KS:
        shares = []
        for group in (group for group in groups if len(group) >= k):
            hits = [any(subset) for subset in combinations(group, k)]
            shares.append(sum(hits) / len(hits))
        expected[f"pass_at_{k}"] = sum(shares) / len(shares)
    return expected


def pass_metrics(*updates: tuple[Tensor, Tensor]) -> PassMetrics:
    metric = PassMetrics(KS)
    for rewards, group_ids in updates:
        metric.update(rewards, group_ids)
    return metric


def test_pass_at_k_of_ragged_groups_equals_counting_every_subset():
    rewards, group_ids = ragged_groups()
    actual = pass_metrics((rewards, group_ids)).compute()
    assert actual == pytest.approx(brute_force(rewards, group_ids), rel=1e-12)


def test_pass_at_k_is_exactly_0_without_and_exactly_1_with_only_correct_responses():
    group_ids = torch.zeros(8, dtype=torch.int64)
    for reward in (0.0, 1.0):
        figures = pass_metrics((torch.full((8,), reward), group_ids)).compute()
        assert [figures[f"pass_at_{k}"] for k in KS] == [reward] * len(KS)


def test_order_of_rollouts_and_names_of_groups_do_not_matter():
    rewards, group_ids = ragged_groups()
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(7))
    renamed = 1_000_000 - group_ids
    expected = pass_metrics((rewards, group_ids)).compute()
    assert pass_metrics((rewards[order], renamed[order])).compute() == pytest.approx(expected)


def test_rewards_of_minus_one_and_zero_are_both_wrong():
    rewards, group_ids = ragged_groups()
    assert (
        pass_metrics((2 * rewards - 1, group_ids)).compute()
        == pass_metrics((rewards, group_ids)).compute()
    )


def test_a_group_smaller_than_k_counts_for_avg_but_not_for_pass_at_k():
    rewards = torch.tensor([1.0, 0.0, 0.0])
    figures = pass_metrics((rewards, torch.tensor([0, 1, 1]))).compute()
    assert figures["avg_at_n"] == 0.5
    assert figures["pass_at_2"] == 0.0
    assert math.isnan(figures["pass_at_4"])


def test_two_ranks_merged_equal_one_that_saw_all_and_an_empty_rank_adds_nothing():
    rewards, group_ids = ragged_groups()
    mine = group_ids % 3 == 0
    whole = pass_metrics((rewards, group_ids)).compute()
    merged = pass_metrics((rewards[mine], group_ids[mine]))
    merged.merge_state(pass_metrics((rewards[~mine], group_ids[~mine])))
    merged.merge_state(pass_metrics((rewards[:0], group_ids[:0])))
    assert merged.compute() == pytest.approx(whole, rel=1e-12)


def test_no_prompt_at_all_gives_nan_not_a_crash():
    figures = pass_metrics((torch.zeros(0), torch.zeros(0, dtype=torch.int64))).compute()
    assert figures.pop("num_prompts") == 0
    assert all(math.isnan(value) for value in figures.values())


def test_k_below_one_is_refused_by_name():
    with pytest.raises(UserError, match="ks must all be at least 1"):
        PassMetrics(ks=(1, 0))


def test_a_long_microbatch_weighs_more_than_a_short_one():
    means = WeightedMeans()
    means.update({"entropy": torch.tensor(2.0)}, torch.tensor(1.0))  # 1 token of entropy 2
    means.update({"entropy": torch.tensor(9.0)}, torch.tensor(9.0))  # 9 tokens of entropy 1
    assert means.compute() == {"entropy": 1.1}


def test_zero_weight_changes_nothing_but_makes_the_name_known():
    means = WeightedMeans()
    means.update({"loss": torch.tensor(3.0)}, torch.tensor(2.0))
    means.update({"loss": torch.tensor(math.nan), "new": torch.tensor(0.0)}, torch.tensor(0.0))
    figures = means.compute()
    assert figures["loss"] == 1.5
    assert math.isnan(figures["new"])


def test_a_nan_sum_stays_visible_in_the_mean():
    means = WeightedMeans()
    means.update({"loss": torch.tensor(1.0)}, torch.tensor(1.0))
    means.update({"loss": torch.tensor(math.nan)}, torch.tensor(1.0))
    assert math.isnan(means.compute()["loss"])


def test_weighted_means_lose_nothing_to_float32():
    means = WeightedMeans()
    means.update({"loss": torch.tensor(2.0**25)}, torch.tensor(2.0**25))
    means.update({"loss": torch.tensor(0.0)}, torch.tensor(1.0))
    assert means.compute()["loss"] == 2**25 / (2**25 + 1)


def test_reset_forgets_what_was_added_before_it():
    means = WeightedMeans()
    means.update({"a.b/values": torch.tensor(4.0)}, torch.tensor(1.0))
    means.reset()
    means.update({"a.b/values": torch.tensor(6.0)}, torch.tensor(2.0))
    assert means.compute() == {"a.b/values": 3.0}


def compute_on_a_rank(rank: int, folder: str) -> None:
    """Rank 0 holds all data; rank 1 only the names, met in the other order."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rewards, group_ids = ragged_groups()
    means = WeightedMeans()
    if rank == 0:
        passes = pass_metrics((rewards, group_ids))
        means.update({"a": torch.tensor(8.0), "b": torch.tensor(2.0)}, torch.tensor(4.0))
    else:
        passes = pass_metrics((rewards[:0], group_ids[:0]))
        means.update({"b": torch.tensor(0.0), "a": torch.tensor(0.0)}, torch.tensor(0.0))
    torch.save((passes.compute(), means.compute()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_reduce_to_the_same_figures_when_one_has_no_data(tmp_path: Path):
    # Spawned: a fork of a process that has run threads may wait for one of them for ever.
    forked.on_ranks(compute_on_a_rank, (str(tmp_path),), 2)
    expected = brute_force(*ragged_groups())
    for rank in range(2):
        passes, means = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert passes == pytest.approx(expected, rel=1e-12)
        assert means == {"a": 2.0, "b": 0.5}
