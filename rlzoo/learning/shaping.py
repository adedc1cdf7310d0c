"""Rewards before they are credited: another scale, penalties of length."""

from __future__ import annotations

from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.types import Rollouts


def plus_minus_one(rollouts: Rollouts) -> Tensor:
    """[N] rewards of 0 to 1 as -1 to 1.

    Raises:
        UserError: one is outside of [0, 1], and would not land there.
    """
    inside = (rollouts.rewards >= 0) & (rollouts.rewards <= 1)
    for i in (~inside).nonzero()[:1, 0].tolist():
        prompt = rollouts.prompts[int(rollouts.group_ids[i])]
        raise UserError(
            f"algo.reward_scale=plus_minus_one takes rewards from [0, 1] to [-1, 1], but prompt"
            f" {prompt.id} has one of {float(rollouts.rewards[i]):g}. Set"
            " algo.reward_scale=zero_one, which leaves rewards as they are."
        )
    return 2 * rollouts.rewards - 1


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
