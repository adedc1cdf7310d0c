from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlzoo.allocators.base import round_to_total


class Uniform:
    """Every prompt gets the same budget, give or take one: the baseline of every other sampler."""

    def observe(
        self,
        prompt_ids: Sequence[str],
        rewards: Sequence[Sequence[float]],
        lengths: Sequence[Sequence[int]],
        grad_norms: Sequence[float] | None = None,
    ) -> None:
        pass

    def allocate(self, prompt_ids: Sequence[str], total: int, round_: int = 0) -> list[int]:
        return round_to_total(np.full(len(prompt_ids), 1 / len(prompt_ids)), total)

    def done(self, prompt_id: str) -> bool:
        return True

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
