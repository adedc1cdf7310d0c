from __future__ import annotations

from typing import Any

from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.errors import check_choice
from rlzoo.learning.advantages import leave_one_out_advantages
from rlzoo.types import OptimizerFactory, PolicyFactory, Rollouts


class RLOO(PolicyAlgorithm):
    """Reinforce leave-one-out (arXiv:2402.14740): the baseline is the mean of the other rollouts.

    Trains on every rollout, credits each with its reward minus the mean reward of the rest of its
    group, and minimises the clipped surrogate. Departs from the paper, which makes one update per
    rollout step and so needs no ratio; with `updates=1` the two are the same.

    Args:
        singleton: advantage of a group of one, "zero" or its "reward".
    """

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        *,
        singleton: str = "zero",
        **shared: Any,
    ) -> None:
        super().__init__(policy, optimizer, **shared)
        check_choice("algo.singleton", singleton, ("zero", "reward"))
        self.singleton, self.smallest_group = singleton, 2 if singleton == "zero" else 1

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        return leave_one_out_advantages(
            rollouts.rewards, rollouts.group_ids, singleton=self.singleton
        )
