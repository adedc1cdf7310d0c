from __future__ import annotations

from torch import Tensor

from rlzoo.algos.grpo import GRPO
from rlzoo.learning.losses import LossOutput, clipped_weight_loss
from rlzoo.types import RolloutBatch


class CISPO(GRPO):
    """CISPO (MiniMax-M1, arXiv:2506.13585): the ratio is a bounded weight, not a gate.

    Trains on every rollout, credits each with its reward standardised within its group, and
    minimises -log pi times the advantage and the clipped ratio, without gradient through the
    ratio: a token beyond the clip keeps a gradient. The paper bounds the ratio from above alone.
    """

    has_dual_clip = False

    def policy_loss(self, logprobs: Tensor, batch: RolloutBatch) -> LossOutput:
        return clipped_weight_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.weights,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
