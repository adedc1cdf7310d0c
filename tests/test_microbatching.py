import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlzoo.learning.microbatching import balance, split_updates, token_weights

VALUES = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]  # a term of each token
LENGTHS = torch.tensor([3, 1])


def average(aggregation: str, rollout_weights: tuple[float, float] = (1.0, 1.0)) -> float:
    weights = token_weights(LENGTHS, torch.tensor(rollout_weights), aggregation, max_length=5)
    total = sum(w * x.sum() for w, x in zip(weights.per_token, VALUES, strict=True))
    return float(total) / weights.divisor


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("token_mean", 16 / 4),
        ("seq_mean_token_mean", (6 / 3 + 10) / 2),
        ("seq_mean_token_sum", (6 + 10) / 2),
        ("fixed_length", (6 / 5 + 10 / 5) / 2),
    ],
)
def test_each_aggregation_is_the_mean_it_is_named_for(aggregation, expected):
    assert average(aggregation) == pytest.approx(expected)


def test_a_rollout_of_weight_zero_counts_neither_above_nor_below():
    assert average("token_mean", (1.0, 0.0)) == pytest.approx(2)
    assert average("seq_mean_token_sum", (0.0, 2.0)) == pytest.approx(10)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 8))
def test_balanced_parts_hold_everything_once_and_differ_by_at_most_one_item(costs, parts):
    split = balance(costs, parts)
    assert sorted(sum(split, [])) == list(range(len(costs))) and len(split) == parts
    loads = [sum(costs[i] for i in part) for part in split]
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(st.integers(0, 50), st.integers(1, 6), st.integers(0, 5))
def test_updates_hold_every_rollout_once_in_equal_numbers(num, updates, seed):
    split = split_updates(num, updates, seed)
    assert sorted(sum(split, [])) == list(range(num)) and len(split) == updates
    assert max(map(len, split)) - min(map(len, split)) <= 1


def test_another_seed_deals_rollouts_out_differently():
    assert split_updates(20, 2, 0) != split_updates(20, 2, 1)
