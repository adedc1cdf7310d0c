from __future__ import annotations

from torch import Tensor

from rlzoo.algos.grpo import GRPO
from rlzoo.learning.losses import LossOutput, sequence_clipped_surrogate_loss
from rlzoo.types import RolloutBatch


class GSPO(GRPO):
    """Group Sequence Policy Optimization (arXiv:2507.18071): GRPO with one ratio per response.

    Trains on every rollout, credits each with its reward standardised within its group, and
    minimises the surrogate clipped on the geometric mean of the response's token ratios. The paper
    averages responses (`aggregation=seq_mean_token_mean`) and has no dual clip: so does gspo.yaml.
    """

    has_dual_clip = False

    def policy_loss(self, logprobs: Tensor, batch: RolloutBatch) -> LossOutput:
        return sequence_clipped_surrogate_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.weights,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
