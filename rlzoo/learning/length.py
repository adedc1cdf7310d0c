"""Rewards of length: pure functions of token counts."""

from __future__ import annotations

from torch import Tensor


def soft_overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """[N] penalty in [-1, 0] for coming near the length limit (DAPO, arXiv:2503.14476 Eq. 13).

    0 up to max_length - buffer tokens, then falling linearly to -1 at max_length.

    Args:
        lengths: [N] response tokens.
        max_length: limit, tokens.
        buffer: tokens before the limit over which the penalty grows; 0 is no penalty.
    """
    if buffer == 0:
        return lengths.float() * 0
    return ((max_length - buffer - lengths.float()) / buffer).clamp(-1, 0)
