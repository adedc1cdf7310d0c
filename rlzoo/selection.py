"""Which rollouts train: pure masks over a rollout step."""

from __future__ import annotations

from torch import Tensor

from rlzoo.advantages import DEGENERATE, group_stats


def correct(rewards: Tensor) -> Tensor:
    """[N] bool: the rollouts with the full reward of 1 (RAFT; arXiv:2504.11343 section 3)."""
    return rewards > 1 - DEGENERATE


def mixed_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups that hold right and wrong ones (Reinforce-Rej).

    A group of one is degenerate and goes; released code keeps it (algorithms.md 1.5).
    """
    return ~group_stats(rewards, group_ids).degenerate
