import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlzoo.learning.advantages import (
    generalized_advantages,
    group_advantages,
    group_stats,
    split_groups,
)
from rlzoo.learning.selection import correct, mixed_groups


def advantages(*rewards: float, **options: object) -> list[float]:
    return group_advantages(
        torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.long), **options
    ).tolist()


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ((1, 0, 0, 0), (1.5, -0.5, -0.5, -0.5)),
        ((1, 1, 0, 0), (0.8660, 0.8660, -0.8660, -0.8660)),
        ((1, 1, 1, 0), (0.5, 0.5, 0.5, -1.5)),
    ],
)
@pytest.mark.parametrize("scale", [lambda r: r, lambda r: 2 * r - 1])
def test_grpo_has_its_known_values_on_either_reward_scale(rewards, expected, scale):
    assert advantages(*map(float, map(scale, rewards))) == pytest.approx(expected, abs=1e-4)


def test_mean_only_advantages_keep_the_rewards_scale():
    assert advantages(1.0, -1.0, -1.0, -1.0, scale_by_std=False) == [1.5, -0.5, -0.5, -0.5]


def test_a_singleton_gets_zero_or_its_reward_as_asked():
    assert advantages(1.0) == [0.0]
    assert advantages(1.0, singleton="reward") == [1.0]


def test_rewards_equal_but_for_rounding_are_degenerate():
    one_and_the_next_float = (1.0, 1.0 + 2**-23, 1.0)  # their std is not 0
    assert advantages(*one_and_the_next_float) == [0.0, 0.0, 0.0]


groups = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0])), min_size=1, max_size=40
)


@given(groups)
def test_advantages_sum_to_zero_in_every_group_and_vanish_in_degenerate_ones(members):
    ids = torch.tensor([group for group, _ in members])
    rewards = torch.tensor([reward for _, reward in members])
    result = group_advantages(rewards, ids)
    for group in ids.unique():
        mine = ids == group
        assert abs(float(result[mine].sum())) < 1e-4
        if rewards[mine].min() == rewards[mine].max():
            assert (result[mine] == 0).all()


@given(groups, st.randoms())
def test_advantages_follow_their_rollouts_through_any_order(members, random):
    order = list(range(len(members)))
    random.shuffle(order)
    ids = torch.tensor([group for group, _ in members])
    rewards = torch.tensor([reward for _, reward in members])
    shuffled = group_advantages(rewards[order], ids[order])
    torch.testing.assert_close(shuffled, group_advantages(rewards, ids)[order])


def test_group_std_is_unbiased():
    stats = group_stats(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([7, 7, 3]))
    assert stats.std.tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0.0])
    assert stats.size.tolist() == [2, 2, 1]


@given(st.integers(1, 30), st.integers(2, 8))
def test_split_groups_are_even_and_never_larger_than_asked(size, limit):
    pieces = split_groups(torch.zeros(size, dtype=torch.long), limit).bincount()
    assert pieces.max() <= limit and pieces.max() - pieces.min() <= 1
    assert len(pieces) == -(-size // limit)


def test_split_groups_never_joins_two_prompts():
    ids = torch.tensor([4, 9, 4, 9, 4])
    split = split_groups(ids, 2)
    assert all(len(ids[split == piece].unique()) == 1 for piece in split.unique())


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_correct_reads_both_reward_scales(low):
    assert correct(torch.tensor([1.0, low])).tolist() == [True, False]


def test_mixed_groups_keeps_whole_groups_that_hold_right_and_wrong():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    assert mixed_groups(rewards, ids).tolist() == [True, True] + [False] * 5


def test_values_of_padding_change_no_credit():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]])
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    values = torch.tensor([[0.3, 0.4, 9.0, -9.0], [0.1, 0.2, 0.3, 0.4]])
    found = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    last, first = 1 - 0.4, 0.9 * 0.4 - 0.3
    assert found.advantages[0].tolist() == pytest.approx([first + 0.45 * last, last, 0, 0])
    assert found.returns[0].tolist() == pytest.approx([first + 0.45 * last + 0.3, 1, 0, 0])
    alone = generalized_advantages(rewards[1:], values[1:], mask[1:], gamma=0.9, lam=0.5)
    torch.testing.assert_close(found.advantages[1:], alone.advantages)
