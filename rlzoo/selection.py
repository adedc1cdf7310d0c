"""Which rollouts train: pure masks and pairs over a rollout step."""

from __future__ import annotations

from torch import Tensor

from rlzoo.advantages import DEGENERATE, group_stats


def correct(rewards: Tensor) -> Tensor:
    """[N] bool: the rollouts with the full reward of 1 (RAFT; arXiv:2504.11343 section 3)."""
    return rewards > 1 - DEGENERATE


def solved_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups in which every one is correct."""
    return group_stats(rewards, group_ids).low > 1 - DEGENERATE


def unsolved_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups in which none is correct."""
    return group_stats(rewards, group_ids).high <= 1 - DEGENERATE


def mixed_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups that hold right and wrong ones (Reinforce-Rej).

    A group of one is degenerate and goes; released code keeps it (algorithms.md 1.5).
    """
    return ~group_stats(rewards, group_ids).degenerate


def best_and_worst(
    rewards: Tensor, group_ids: Tensor, *, chosen_must_be_correct: bool = True
) -> list[tuple[int, int]]:
    """(chosen, rejected) of every group that has a pair: its best and its worst rollout.

    Among equals the one drawn first is taken; responses of a prompt are exchangeable.

    Args:
        rewards: [N] in [0, 1].
        group_ids: [N] int64.
        chosen_must_be_correct: False also pairs a wrong rollout with a worse one, as reference
            code does (algorithms.md 1.8).
    """
    values, members = rewards.tolist(), {}
    for i, group in enumerate(group_ids.tolist()):
        members.setdefault(group, []).append(i)
    pairs = []
    for mine in members.values():
        best, worst = max(mine, key=values.__getitem__), min(mine, key=values.__getitem__)
        degenerate = values[best] - values[worst] <= DEGENERATE
        if not degenerate and (values[best] > 1 - DEGENERATE or not chosen_must_be_correct):
            pairs.append((best, worst))
    return pairs
