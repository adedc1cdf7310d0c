from __future__ import annotations

from torch import Tensor

from rlzoo.algos.clipped import ClippedPolicyAlgorithm
from rlzoo.selection import mixed_groups
from rlzoo.types import Rollouts


class ReinforceRej(ClippedPolicyAlgorithm):
    """Reinforce-Rej (arXiv:2504.11343 section 5.2): Reinforce without the useless prompts.

    Trains on groups that hold right and wrong rollouts, credits each rollout with its reward of
    +1 or -1, and minimises the clipped surrogate. The released code has rewards of 0 and 1, which
    turns it into RAFT++ without the all-correct prompts; `reward_scale=zero_one` is that.
    """

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        return rollouts.rewards

    def select(self, rollouts: Rollouts) -> Tensor:
        return mixed_groups(rollouts.rewards, rollouts.group_ids)
