from __future__ import annotations

from torch import Tensor

from rlzoo.advantages import group_advantages, whiten
from rlzoo.algos.clipped import ClippedPolicyAlgorithm
from rlzoo.types import Rollouts


class ReinforcePPBaseline(ClippedPolicyAlgorithm):
    """Reinforce++-baseline (arXiv:2501.03262): a group's mean as baseline, one global scale.

    Trains on every rollout, credits each with its reward minus its group's mean, whitened over all
    tokens of the rollout step, and minimises the clipped surrogate. A group of one has advantage 0
    before the whitening.
    """

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        advantages = group_advantages(rollouts.rewards, rollouts.group_ids, scale_by_std=False)
        return whiten(advantages, rollouts.lengths)
