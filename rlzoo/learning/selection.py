"""Which rollouts train: pure masks and pairs over a rollout step."""

from __future__ import annotations

from torch import Tensor

from rlzoo.learning.advantages import DEGENERATE, group_stats
from rlzoo.rewards.base import is_right


def correct(rewards: Tensor) -> Tensor:
    """[N] bool: the right rollouts (`rlzoo.rewards.base.is_right`)."""
    return is_right(rewards)


def solved_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups in which every one is correct."""
    return is_right(group_stats(rewards, group_ids).low)


def unsolved_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups in which none is correct."""
    return ~is_right(group_stats(rewards, group_ids).high)


def mixed_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups that hold right and wrong ones (Reinforce-Rej, DAPO).

    A group of one is never mixed and goes; released code keeps it (docs/formulas.md 7.2).
    """
    stats = group_stats(rewards, group_ids)
    return is_right(stats.high) & ~is_right(stats.low)


def best_and_worst(
    rewards: Tensor, group_ids: Tensor, *, chosen_must_be_correct: bool = True
) -> list[tuple[int, int]]:
    """(chosen, rejected) of every group that has a pair: its best and its worst rollout.

    Among equals the one drawn first is taken; responses of a prompt are exchangeable.

    Args:
        rewards: [N] in [0, 1].
        group_ids: [N] int64.
        chosen_must_be_correct: False also pairs a wrong rollout with a worse one, as reference
            code does (docs/formulas.md 7.3).
    """
    values, members = rewards.tolist(), {}
    for i, group in enumerate(group_ids.tolist()):
        members.setdefault(group, []).append(i)
    pairs = []
    for mine in members.values():
        best, worst = max(mine, key=values.__getitem__), min(mine, key=values.__getitem__)
        degenerate = values[best] - values[worst] <= DEGENERATE
        if not degenerate and (is_right(values[best]) or not chosen_must_be_correct):
            pairs.append((best, worst))
    return pairs
