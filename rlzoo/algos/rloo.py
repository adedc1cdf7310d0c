from __future__ import annotations

from typing import Any

from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.algos.options import Singleton
from rlzoo.learning.advantages import leave_one_out_advantages
from rlzoo.types import OptimizerFactory, PolicyFactory, Rollouts


class RLOO(PolicyAlgorithm):
    """Reinforce leave-one-out (arXiv:2402.14740): the baseline is the mean of the other rollouts.

    Trains on every rollout, credits each with its reward minus the mean reward of the rest of its
    group, and minimises the clipped surrogate.

    rloo.yaml departs from the paper in four ways: 4 updates per rollout step, so a ratio and its
    clip, where the paper makes one and needs none; a dual clip of 3, from released code; tokens are
    averaged (`token_mean`), where the paper sums log pi over the sequence (`seq_mean_token_sum`);
    and no KL, which the paper takes from the reward (`kl_coef`, `kl_in=reward`).

    Args:
        singleton: advantage of a group of one, "zero" or its "reward".
    """

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        *,
        singleton: Singleton = "zero",
        **shared: Any,
    ) -> None:
        super().__init__(policy, optimizer, **shared)
        self.singleton, self.smallest_group = singleton, 2 if singleton == "zero" else 1

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        return leave_one_out_advantages(
            rollouts.rewards, rollouts.group_ids, singleton=self.singleton
        )
