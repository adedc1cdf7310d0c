from __future__ import annotations

from typing import Any

from torch import Tensor

from rlzoo.algos.clipped import ClippedPolicyAlgorithm
from rlzoo.errors import check_choice
from rlzoo.learning.advantages import group_advantages, whiten
from rlzoo.types import OptimizerFactory, PolicyFactory, Rollouts


class ReinforcePPBaseline(ClippedPolicyAlgorithm):
    """Reinforce++-baseline (arXiv:2501.03262): a group's mean as baseline, one global scale.

    Trains on every rollout, credits each with its reward minus its group's mean, whitened over all
    tokens of the rollout step, and minimises the clipped surrogate.

    Args:
        singleton: what a group of one gets before the whitening, "zero" or its "reward" (verl).
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
        self.singleton = singleton

    @property
    def smallest_group(self) -> int:
        return 2 if self.singleton == "zero" else 1

    @property
    def scale_free(self) -> bool:
        return self.singleton == "zero"

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        advantages = group_advantages(
            rollouts.rewards, rollouts.group_ids, scale_by_std=False, singleton=self.singleton
        )
        return whiten(advantages, rollouts.lengths)
