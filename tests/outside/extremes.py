"""An algorithm from outside the repository: GRPO on the best and the worst of each group, which is
then standardised over those that are kept."""

import torch

from rlzoo.algos import GRPO
from rlzoo.learning.advantages import group_advantages


class Extremes(GRPO):
    def __init__(self, policy, optimizer, *, keep: int = 4, **shared):
        super().__init__(policy, optimizer, **shared)
        self.keep, self.can_reject = keep, True

    def select(self, rollouts):
        kept = torch.zeros(len(rollouts), dtype=torch.bool)
        for group in rollouts.group_ids.unique():
            members = (rollouts.group_ids == group).nonzero()[:, 0]
            order = members[rollouts.rewards[members].argsort(descending=True, stable=True)]
            best = (self.keep + 1) // 2
            kept[order[:best]] = kept[order[best:][-(self.keep - best) :]] = True
        return kept

    def compute_advantages(self, rollouts):
        kept, advantages = rollouts.selected, torch.zeros(len(rollouts))
        advantages[kept] = group_advantages(rollouts.rewards[kept], rollouts.group_ids[kept])
        return advantages
