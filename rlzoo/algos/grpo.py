from __future__ import annotations

from typing import Any

from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.algos.options import GroupSize, Singleton
from rlzoo.errors import check_acts
from rlzoo.learning.advantages import group_advantages, split_groups
from rlzoo.learning.selection import Selection, mixed_groups
from rlzoo.types import OptimizerFactory, PolicyFactory, Rollouts


class GRPO(PolicyAlgorithm):
    """Group Relative Policy Optimization (arXiv:2402.03300).

    Trains on every rollout, credits each with its reward standardised within its group, and
    minimises PPO's clipped surrogate plus a KL term to the initial policy (`kl_coef`).

    grpo.yaml departs from the paper in four ways: the KL is off (the paper's coefficient is 0.04);
    it makes 4 updates per rollout step (the paper: 1); tokens are averaged over the whole optimizer
    step (`token_mean`), not first within each response, so tokens of long responses weigh as much
    as others; and a dual clip of 3, from released code, bounds the loss where the advantage is
    negative. dapo.yaml departs in two: rounds of drawing end at 4 (`sampler=dynamic`), where the
    paper's go on until a batch is full of mixed groups, so that batches are smaller; and the
    penalty of length begins at the last tenth of the limit (the paper: the last fifth).

    Args:
        scale_by_std: False is Dr. GRPO's unscaled advantage (arXiv:2503.20783).
        singleton: advantage of a group of one, "zero" or its "reward" (released code).
        group_size: cuts larger groups into groups of at most this many before standardising
            (the paper's GVM-GRPO has 4, arXiv:2505.02391); null keeps one group per prompt.
        mixed_groups_only: rejects groups that are all right or all wrong (DAPO's filter,
            arXiv:2503.14476; `sampler=dynamic` draws others in their place).
    """

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        *,
        scale_by_std: bool = True,
        singleton: Singleton = "zero",
        group_size: GroupSize = None,
        mixed_groups_only: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(policy, optimizer, **shared)
        self.scale_by_std, self.singleton, self.group_size = scale_by_std, singleton, group_size
        self.mixed_groups_only = mixed_groups_only
        self.can_reject = self.overlong_filter or mixed_groups_only
        self.smallest_group = 2 if singleton == "zero" or mixed_groups_only else 1
        self.scale_free = scale_by_std and singleton == "zero"
        if self.rejected == "zero" and not self.shapes_rewards and singleton == "zero":
            why = "with algo.rejected=zero such groups stay, and their advantages are 0 in any case"
            check_acts("algo.mixed_groups_only", mixed_groups_only, False, f"{why} (DAPO: drop)")
        if mixed_groups_only and group_size is None:
            why = "algo.mixed_groups_only=true rejects groups of one"
            check_acts("algo.singleton", singleton, "zero", why)

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        groups = rollouts.group_ids
        if self.group_size is not None:
            groups = split_groups(groups, self.group_size)
        return group_advantages(
            rollouts.rewards, groups, scale_by_std=self.scale_by_std, singleton=self.singleton
        )

    def select(self, rollouts: Rollouts) -> Selection:
        if self.mixed_groups_only:
            return mixed_groups(rollouts.rewards, rollouts.group_ids)
        return super().select(rollouts)
