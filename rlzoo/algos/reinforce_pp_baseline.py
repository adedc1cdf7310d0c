from __future__ import annotations

from typing import Any

from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.algos.options import Singleton
from rlzoo.learning.advantages import group_advantages, whiten
from rlzoo.types import OptimizerFactory, PolicyFactory, Rollouts


class ReinforcePPBaseline(PolicyAlgorithm):
    """Reinforce++-baseline (arXiv:2501.03262): a group's mean as baseline, one global scale.

    Trains on every rollout, credits each with its reward minus its group's mean, whitened over all
    tokens of the rollout step, and minimises the clipped surrogate. The YAML departs from the paper
    in that its KL is off, and in a dual clip of 3, from released code.

    Args:
        singleton: what a group of one gets before the whitening, "zero" or its "reward" (verl).
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
        self.scale_free = singleton == "zero"

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        advantages = group_advantages(
            rollouts.rewards, rollouts.group_ids, scale_by_std=False, singleton=self.singleton
        )
        return whiten(advantages, rollouts.lengths)
