import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlzoo.learning import microbatching
from rlzoo.learning.microbatching import balance, in_bins, size_of, split_updates, token_weights

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


ITEMS = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=2), max_size=60)


@given(ITEMS, st.integers(1, 8), st.integers(100, 3000), st.booleans())
def test_bins_hold_everything_once_within_the_budget_and_as_many_on_every_rank(
    items, ranks, budget, padded
):
    sizes = [size_of(tokens) for tokens in items]
    bins = in_bins(sizes, ranks, budget, padded)
    assert sorted(i for parts in bins for part in parts for i in part) == list(range(len(items)))
    assert len(bins) == ranks and len({len(parts) for parts in bins}) == 1
    for part in (part for parts in bins for part in parts if len(part) > 1):
        rows = [tokens for i in part for tokens in items[i]]
        largest = max(max(size.tokens for size in sizes), budget)
        assert (len(rows) * max(rows) if padded else sum(rows)) <= (budget if padded else largest)


@given(st.lists(st.integers(1, 500), min_size=8, max_size=200), st.integers(1, 8))
def test_bins_are_nearly_as_few_as_can_be(tokens, ranks):
    """A third more than the tokens ask for, and one: what dealing them out evenly may cost."""
    sizes = [size_of([n]) for n in tokens]
    count = len(in_bins(sizes, ranks, 1000)[0])
    share = max(sum(tokens[i] for i in part) for part in balance(tokens, ranks))
    assert count <= 1 + 4 / 3 * share / 1000 + 1


def test_rows_of_like_length_go_together_where_they_are_padded():
    sizes = [size_of([n]) for n in (100, 10, 90, 10, 10, 10)]
    assert in_bins(sizes, 1, 200, padded=True) == [[[0, 2], [1, 3, 4, 5]]]


def test_microbatches_of_one_long_rollout_each_are_found_in_few_tries(monkeypatch):
    """Trying one more microbatch at a time took ten minutes for a step of 8,192."""
    tries = []
    monkeypatch.setattr(microbatching, "balance", lambda *a: tries.append(a) or balance(*a))
    sizes = [size_of([600 + i % 3]) for i in range(700)]
    (parts,) = in_bins(sizes, 1, 1000)
    assert len(parts) == 700 and all(len(part) == 1 for part in parts)
    assert len(tries) < 50
