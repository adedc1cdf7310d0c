from __future__ import annotations

from typing import Any

from torch import Tensor

from rlzoo.algos.reinforce import Reinforce
from rlzoo.errors import check_acts
from rlzoo.learning.selection import mixed_groups
from rlzoo.types import OptimizerFactory, PolicyFactory, Rollouts


class ReinforceRej(Reinforce):
    """Reinforce-Rej (arXiv:2504.11343 section 5.2): Reinforce without the useless prompts.

    Trains on groups that hold right and wrong rollouts, credits each rollout with its reward of
    +1 or -1, and minimises the clipped surrogate. The released code has rewards of 0 and 1, which
    turns it into RAFT++ without the all-correct prompts; `reward_scale=zero_one` is that. The YAML
    departs from the paper as that of `Reinforce` does: token mean, dual clip of 3.

    Args:
        scale_by_std: divides by the group's standard deviation (the paper's last ablation).
    """

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        *,
        scale_by_std: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(policy, optimizer, scale_by_std=scale_by_std, **shared)
        self.can_reject, self.smallest_group = True, 2
        for key in ("drop_solved", "drop_unsolved"):
            why = "Reinforce-Rej rejects groups without contrast, both kinds"
            check_acts(f"algo.{key}", getattr(self, key), False, why)

    def select(self, rollouts: Rollouts) -> Tensor:
        return mixed_groups(rollouts.rewards, rollouts.group_ids)
