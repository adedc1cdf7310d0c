from __future__ import annotations

from collections.abc import Sequence

from rlzoo.allocators.uniform import Uniform
from rlzoo.rewards.base import is_right
from rlzoo.values import AtLeast1


class Dynamic(Uniform):
    """DAPO's dynamic sampling (arXiv:2503.14476 section 3.2): uniform budgets, in rounds.

    A prompt whose responses are all right or all wrong is replaced, in the next round of the same
    rollout step, by another one. What was drawn for it is paid for.

    Args:
        max_rounds: draws of one rollout step; what is still degenerate then is left as it is.
    """

    def __init__(self, max_rounds: AtLeast1 = 4) -> None:
        self.max_rounds = max_rounds
        self._degenerate: set[str] = set()  # of the round seen last

    def observe(
        self,
        prompt_ids: Sequence[str],
        rewards: Sequence[Sequence[float]],
        grad_norms: Sequence[float] | None = None,
    ) -> None:
        self._degenerate = {
            prompt_id
            for prompt_id, mine in zip(prompt_ids, rewards, strict=True)
            if is_right(max(mine)) == is_right(min(mine))
        }

    def done(self, prompt_id: str) -> bool:
        return prompt_id not in self._degenerate
