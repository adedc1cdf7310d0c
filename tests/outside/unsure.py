"""An algorithm from outside the repository: GRPO whose credit goes where the policy was unsure."""

import torch

from rlzoo.algos import GRPO


class Unsure(GRPO):
    scores = ("old_logprobs", "entropy")
    credit_scores = ("entropy",)

    def compute_advantages(self, rollouts):
        advantages, entropy = super().compute_advantages(rollouts), rollouts.scores["entropy"]
        mean = torch.cat([torch.zeros(0), *entropy]).mean()
        return [a * e / mean for a, e in zip(advantages, entropy, strict=True)]
