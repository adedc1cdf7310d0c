"""How long a prompt's responses were so far: the engine begins with those that take longest."""

from __future__ import annotations

import torch

from rlzoo.types import Rollouts


class Lengths:
    """Mean tokens of the responses of each prompt that was drawn, whichever stream drew them.

    Saved with the run: in which order responses are decoded may decide a near tie, and a resumed
    run repeats that too.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[int, int]] = {}  # by prompt id: tokens, responses

    def observe(self, rollouts: Rollouts) -> None:
        num = torch.bincount(rollouts.group_ids, minlength=len(rollouts.prompts)).tolist()
        tokens = torch.zeros(len(rollouts.prompts), dtype=torch.long)
        tokens.index_add_(0, rollouts.group_ids, rollouts.lengths)
        for prompt, total, count in zip(rollouts.prompts, tokens.tolist(), num, strict=True):
            before = self.sums.get(prompt.id, (0, 0))
            self.sums[prompt.id] = (before[0] + total, before[1] + count)

    def expected(self, prompt_id: str, otherwise: float) -> float:
        """Tokens of a response to this prompt; `otherwise` if none was drawn yet."""
        tokens, responses = self.sums.get(prompt_id, (0, 0))
        return tokens / responses if responses else otherwise
