"""Rewards of a user's own, as tests name them in `reward._target_`."""

from rlzoo.rewards.base import Scores


def graded(prompts, texts, truncated):
    """.2 or .6 by turns: neither is the full reward."""
    return [0.6 if i % 2 else 0.2 for i in range(len(texts))]


class Nan:
    """1 for every response but the last."""

    def __call__(self, prompts, texts, truncated, **_):
        return Scores([1.0] * (len(texts) - 1) + [float("nan")], None)


def of_another_library(prompts, completions, **columns):
    return [1.0 for _ in completions]
