"""Advantages of whole groups, before any splitting: [N] rewards and group ids in, [N] out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DEGENERATE = 1e-6  # a group whose rewards span no more than this teaches nothing


class GroupStats(NamedTuple):
    """Per-rollout view of its group's rewards; each [N]."""

    size: Tensor  # int64
    mean: Tensor
    std: Tensor  # unbiased (n - 1); 0 for a group of one
    low: Tensor
    high: Tensor

    @property
    def degenerate(self) -> Tensor:
        """[N] bool: all rewards of the group are equal. A floating std of 0 would not do."""
        return self.high - self.low <= DEGENERATE


def group_stats(rewards: Tensor, group_ids: Tensor) -> GroupStats:
    """Statistics of each rollout's group, whatever the order and size of the groups.

    Args:
        rewards: [N] float.
        group_ids: [N] int64, any values; equal ids make a group.
    """
    _, inverse = torch.unique(group_ids, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    zeros = rewards.new_zeros(count, dtype=torch.float64)
    wide = rewards.double()
    size = zeros.index_add(0, inverse, torch.ones_like(wide))
    mean = zeros.index_add(0, inverse, wide) / size.clamp(min=1)
    squares = zeros.index_add(0, inverse, (wide - mean[inverse]) ** 2)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    low = zeros.scatter_reduce(0, inverse, wide, "amin", include_self=False)
    high = zeros.scatter_reduce(0, inverse, wide, "amax", include_self=False)
    each = (x[inverse].to(rewards.dtype) for x in (mean, std, low, high))
    return GroupStats(size[inverse].long(), *each)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale_by_std: bool = True,
    singleton: str = "zero",
    epsilon: float = 1e-6,
) -> Tensor:
    """GRPO: the reward minus its group's mean, over the group's unbiased std (arXiv:2402.03300).

    Args:
        rewards: [N] float.
        group_ids: [N] int64.
        scale_by_std: False keeps the difference unscaled (Dr. GRPO, arXiv:2503.20783).
        singleton: what a group of one gets: "zero", or "reward" (its own reward, as released
            code has it).
        epsilon: added to the std; released code has 1e-6.

    Returns:
        [N]; 0 throughout a degenerate group of more than one.
    """
    stats = group_stats(rewards, group_ids)
    advantages = rewards - stats.mean
    if scale_by_std:
        advantages = advantages / (stats.std + epsilon)
    advantages = torch.where(stats.degenerate, 0.0, advantages)
    if singleton == "reward":
        advantages = torch.where(stats.size == 1, rewards, advantages)
    return advantages


def leave_one_out_advantages(
    rewards: Tensor, group_ids: Tensor, *, singleton: str = "zero"
) -> Tensor:
    """RLOO: the reward minus the mean reward of the others in its group (arXiv:2402.14740 Eq. 8).

    Args:
        rewards, group_ids, singleton: as in `group_advantages`.

    Returns:
        [N]
    """
    stats = group_stats(rewards, group_ids)
    advantages = (rewards - stats.mean) * stats.size / (stats.size - 1).clamp(min=1)
    alone = rewards if singleton == "reward" else torch.zeros_like(rewards)
    return torch.where(stats.size == 1, alone, advantages)


def whiten(values: Tensor, weights: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Values minus their mean, over their standard deviation (unbiased, as in verl).

    Args:
        values: any shape.
        weights: same shape, how often each value counts: a mask, or the tokens of a rollout.
        epsilon: added to the variance.

    Returns:
        Same shape; 0 where the weight is 0, and everywhere if fewer than two values count.
    """
    wide, count = values.double(), weights.double()
    total = count.sum()
    if total < 2:
        return torch.zeros_like(values)
    mean = (wide * count).sum() / total
    variance = ((wide - mean) ** 2 * count).sum() / (total - 1)
    return torch.where(count > 0, (wide - mean) / (variance + epsilon).sqrt(), 0.0).to(values.dtype)


class TokenCredit(NamedTuple):
    advantages: Tensor  # [N, T]
    returns: Tensor  # [N, T] targets of the critic


def generalized_advantages(
    token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> TokenCredit:
    """Generalized advantage estimation (arXiv:1506.02438 Eq. 16), and returns A + V.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with the value after
    a response's last token taken as 0 (some released code lets that of the padding leak in where
    lam < 1; docs/formulas.md 6.6).

    Args:
        token_rewards: [N, T]; outcome rewards stand at the last token of a response.
        values: [N, T] of the state before each token.
        mask: [N, T] bool, response tokens; each row's are contiguous from its first column.

    Returns:
        Both 0 off the mask.
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    later = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        later = torch.where(mask[:, t], delta + gamma * lam * later, 0.0)
        advantages[:, t], next_value = later, values[:, t]
    return TokenCredit(advantages, torch.where(mask, advantages + values, 0.0))


def split_groups(group_ids: Tensor, size: int) -> Tensor:
    """Group ids in which groups are cut, in order, into groups of at most `size`.

    The paper's GVM-GRPO standardises within groups of 4 however many rollouts a prompt got
    (arXiv:2505.02391). The pieces are as even as can be: 9 in fours is 3, 3, 3, not 4, 4, 1.

    Args:
        group_ids: [N] int64.
        size: at least 1.

    Returns:
        [N] int64, new ids.
    """
    _, inverse = torch.unique(group_ids, return_inverse=True)
    ids, offset = torch.empty_like(inverse), 0
    for group in range(int(inverse.max()) + 1 if len(inverse) else 0):
        members = (inverse == group).nonzero()[:, 0]
        pieces = -(-len(members) // size)
        ids[members] = offset + torch.arange(len(members)) * pieces // len(members)
        offset += pieces
    return ids
