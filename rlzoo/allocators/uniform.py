from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlzoo.allocators.base import Allocator, round_to_total


class Uniform(Allocator):
    """Every prompt gets the same budget, give or take one: the baseline of every other sampler."""

    def bounds(self, prompts: int, total: int) -> tuple[int, int]:
        return total // prompts, -(-total // prompts)

    def allocate(self, prompt_ids: Sequence[str], total: int) -> list[int]:
        return round_to_total(np.full(len(prompt_ids), 1 / len(prompt_ids)), total)
