from __future__ import annotations

import torch
from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.learning.selection import correct
from rlzoo.types import Rollouts


class RAFTPlusPlus(PolicyAlgorithm):
    """RAFT++ (arXiv:2504.11343 Eq. 6): RAFT with importance ratio and clipping.

    Trains on the correct rollouts alone, credits each with 1, and minimises the clipped surrogate.
    Departs from the letter of the paper: the indicator is "correct", not "of the largest reward
    of its group", which would select every rollout of an all-wrong group.

    raft_pp.yaml departs in two ways: tokens are averaged over the whole optimizer step
    (`token_mean`), not first within each response; and wrong rollouts leave the denominators
    (`rejected=drop`; released code keeps them). Its dual clip of 3 never acts: no advantage is
    negative.
    """

    uses_reward_values = False
    blames = False  # advantages are 1, or 0 where rejected rollouts stay

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        return torch.ones(len(rollouts))

    def select(self, rollouts: Rollouts) -> Tensor:
        return correct(rollouts.rewards)
