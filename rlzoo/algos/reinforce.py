from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.errors import check_acts
from rlzoo.learning.advantages import group_advantages, group_stats
from rlzoo.learning.selection import solved_groups, unsolved_groups
from rlzoo.types import OptimizerFactory, PolicyFactory, Rollouts


class Reinforce(PolicyAlgorithm):
    """Reinforce with importance ratio and clipping (arXiv:2504.11343 section 5.1), and the
    ablations that lead from it to GRPO.

    Trains on every rollout, credits each with its reward of +1 or -1, and minimises the clipped
    surrogate in the form min(r A, clip(r) A). The paper's Eq. 5 prints min(r, clip(r)) times the
    reward, which for a negative one is no bound at all.

    reinforce.yaml and its ablations depart from the paper in two ways: tokens are averaged over the
    whole optimizer step (`token_mean`), not first within each response; and a dual clip of 3, from
    released code, bounds the loss where the advantage is negative.

    Args:
        baseline: "none", or "mean" of the group, taken from the reward.
        scale_by_std: divides by the group's standard deviation, without taking off the mean.
        drop_solved: rejects groups that are all correct.
        drop_unsolved: rejects groups that are all wrong.
    """

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        *,
        baseline: Literal["none", "mean"] = "none",
        scale_by_std: bool = False,
        drop_solved: bool = False,
        drop_unsolved: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(policy, optimizer, **shared)
        self.baseline, self.scale_by_std = baseline, scale_by_std
        self.drop_solved, self.drop_unsolved = drop_solved, drop_unsolved
        self.can_reject = self.overlong_filter or drop_solved or drop_unsolved
        self.smallest_group = 2 if baseline == "mean" else 1
        self.scale_free = baseline == "mean" and scale_by_std
        self.blames = self.shapes_rewards or (self.reward_scale, baseline) != ("zero_one", "none")
        if baseline == "mean" and self.rejected == "zero" and not self.shapes_rewards:
            why = (
                "with algo.rejected=zero and algo.baseline=mean their advantages are 0 in any case"
            )
            check_acts("algo.drop_solved", drop_solved, False, why)
            check_acts("algo.drop_unsolved", drop_unsolved, False, why)

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        rewards, groups = rollouts.rewards, rollouts.group_ids
        if self.baseline == "mean":
            return group_advantages(rewards, groups, scale_by_std=self.scale_by_std)
        if self.scale_by_std:
            stats = group_stats(rewards, groups)
            return torch.where(stats.degenerate, rewards, rewards / (stats.std + 1e-6))
        return rewards

    def select(self, rollouts: Rollouts) -> Tensor:
        kept = torch.ones(len(rollouts), dtype=torch.bool)
        if self.drop_solved:
            kept &= ~solved_groups(rollouts.rewards, rollouts.group_ids)
        if self.drop_unsolved:
            kept &= ~unsolved_groups(rollouts.rewards, rollouts.group_ids)
        return kept
