from __future__ import annotations

from typing import Any

from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.errors import UserError
from rlzoo.learning.losses import LossOutput, clipped_surrogate_loss
from rlzoo.types import OptimizerFactory, PolicyFactory, RolloutBatch


class ClippedPolicyAlgorithm(PolicyAlgorithm):
    """Base of the algorithms that minimise PPO's clipped surrogate (arXiv:1707.06347 Eq. 7).

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; null leaves
            that side open (the ratio without clip of arXiv:2504.11343).
        dual_clip: bounds the loss at -A * dual_clip where A < 0; null is off.
    """

    has_dual_clip = True  # False where the loss has no place for one

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        *,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.2,
        dual_clip: float | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(policy, optimizer, **shared)
        if clip_low is not None and not 0 < clip_low < 1:
            raise UserError(
                f"algo.clip_low must be in (0, 1) or null, got {clip_low}: the ratio is clipped from"
                " below at 1 - clip_low, which has to stay positive. PPO uses 0.2."
            )
        if clip_high is not None and not clip_high > 0:
            raise UserError(
                f"algo.clip_high must be above 0 or null, got {clip_high}. PPO uses 0.2."
            )
        if dual_clip is not None and not self.has_dual_clip:
            raise UserError(
                f"algo.dual_clip={dual_clip} would do nothing: {type(self).__name__} has none. Set it"
                " to null."
            )
        if dual_clip is not None and not dual_clip > 1:
            raise UserError(
                f"algo.dual_clip must be above 1 or null, got {dual_clip}: it bounds a loss that"
                " is at least -A at ratio 1. Released code uses 3."
            )
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip

    @property
    def blames(self) -> bool:
        """Whether an advantage may be below 0."""
        return True

    def idle_options(self) -> dict[str, str]:
        if self.blames:
            return super().idle_options()
        why = "no advantage is below 0, where alone it acts"
        return super().idle_options() | {"algo.clip_low": why, "algo.dual_clip": why}

    def idle_on_policy(self) -> dict[str, str]:
        if self.updates_per_step > 1:
            return super().idle_on_policy()
        why = "with one update per rollout step (algo.updates=1, algo.passes=1) the ratio is 1"
        keys = ("algo.clip_low", "algo.clip_high", "algo.dual_clip")
        return super().idle_on_policy() | dict.fromkeys(keys, why)

    def policy_loss(self, logprobs: Tensor, batch: RolloutBatch) -> LossOutput:
        return clipped_surrogate_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.weights,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
