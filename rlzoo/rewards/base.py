"""What a reward is: how it is called, what it returns, and when a response is right.

Imports nothing heavy: the verifier's workers, which start fast and without torch, read it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from rlzoo.types import Prompt

FULL_REWARD = 1.0
_ROUNDING = 1e-6  # below the full reward, as float32 has it


class Verdict(IntEnum):
    """What is known of an answer. UNVERIFIABLE earns nothing, but is never counted as wrong."""

    WRONG = 0
    RIGHT = 1
    UNVERIFIABLE = 2  # a limit was hit, the worker died, or the gold answer cannot be parsed


class Scores(NamedTuple):
    """What a reward gives N rollouts."""

    rewards: Tensor  # [N] float32, finite
    verdicts: Tensor  # [N] int8, values of Verdict; RIGHT exactly where `is_right(rewards)`


class Reward(Protocol):
    """Any callable like this one is a reward (docs/extending.md).

    It may return N plain numbers instead of `Scores`, take no `on_progress`, and have no `close`.
    `rlzoo.rewards.calling.RewardCaller` calls it so, and checks what it returns.
    """

    def __call__(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        truncated: Sequence[bool],
        on_progress: Callable[[int], None] | None = None,
    ) -> Scores:
        """Score N rollouts, N > 0.

        Args:
            prompts: [N] the prompt of each rollout; its `answer` is the gold answer.
            texts: [N] responses, without special tokens.
            truncated: [N] whether the response was cut off at the length limit.
            on_progress: called with the number scored so far.
        """

    def close(self) -> None:
        """Let go of processes and files; called once, at the run's end."""


def is_right(rewards: Any) -> Any:
    """Whether each response is right: it has the full reward of 1 (RAFT; arXiv:2504.11343 §3).

    The one meaning of "right": avg@k and pass@k, GVM's acceptance rates, which rollouts RAFT and
    its kin train on, solved and unsolved groups, `accept_rate`, and SFT on a run's rollouts.

    Args:
        rewards: a number, or an array or tensor of any shape. NaN is not right.

    Returns:
        bool, of the same shape.
    """
    return rewards > FULL_REWARD - _ROUNDING
