"""What a reward is: how it is called, what it returns, and when a response is right.

Imports nothing heavy: the verifier's workers, which start fast and without torch, read it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from numpy import ndarray
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
    """Any callable like this one: a function, or an object with `__call__` (docs/extending.md).

    One that takes `on_progress` is given, by that name, a function to call with the number scored
    so far. One that has `close()` has it called once, at the run's end. One that says
    `by_response = True`, in the class that defines its `__call__`, scores each response by itself:
    it is called with a few at a time, from a thread of its own, while others are still being drawn.
    `rlzoo.rewards.calling.RewardCaller` calls it so, and checks what it returns.
    """

    def __call__(
        self, prompts: list[Prompt], texts: list[str], truncated: list[bool], /
    ) -> Scores | Tensor | ndarray | Sequence[float]:
        """Score N rollouts, N > 0.

        Args:
            prompts: [N] the prompt of each rollout; its `answer` is the gold answer.
            texts: [N] responses, without special tokens.
            truncated: [N] whether the response was cut off at the length limit.

        Returns:
            [N] finite numbers; `Scores` where some are UNVERIFIABLE and not wrong.
        """


Answer = TypeVar("Answer", covariant=True)


class Comparable(Protocol[Answer]):
    """A number, or an array or tensor of them."""

    def __gt__(self, other: float, /) -> Answer: ...


def is_right(rewards: Comparable[Answer]) -> Answer:
    """Whether each response is right: it has the full reward of 1 (RAFT; arXiv:2504.11343 §3).

    The one meaning of "right": avg@k and pass@k, GVM's acceptance rates, which rollouts RAFT and
    its kin train on, solved and unsolved groups, `accept_rate`, and SFT on a run's rollouts.

    Args:
        rewards: a number, or an array or tensor of any shape. NaN is not right.

    Returns:
        bool, of the same shape.
    """
    return rewards > FULL_REWARD - _ROUNDING
