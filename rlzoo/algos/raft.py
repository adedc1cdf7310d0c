from __future__ import annotations

import torch
from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.learning.losses import LossOutput, policy_gradient_loss
from rlzoo.learning.selection import correct
from rlzoo.types import RolloutBatch, Rollouts


class RAFT(PolicyAlgorithm):
    """Reward-ranked fine-tuning (arXiv:2504.11343 Eq. 1).

    Trains on the correct rollouts alone, credits each with 1, and minimises -log pi. With
    `rejected=drop` that is supervised training on the accepted set; with `rejected=zero`, as
    released code has it, wrong rollouts stay in the denominators, so that the step scales with
    the share of correct tokens. raft.yaml departs from the paper, which sums over a response, in
    that tokens are averaged over the whole optimizer step (`token_mean`), and takes several updates
    a rollout step, as released code does.
    """

    scores = ()
    has_ratio = False
    uses_reward_values = False

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        return torch.ones(len(rollouts))

    def select(self, rollouts: Rollouts) -> Tensor:
        return correct(rollouts.rewards)

    def policy_loss(self, logprobs: Tensor, batch: RolloutBatch) -> LossOutput:
        return policy_gradient_loss(logprobs, batch.advantages, batch.weights)
