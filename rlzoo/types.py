"""What flows through rlzoo: a Prompt, a rollout step (Rollouts), a microbatch (RolloutBatch).

Letters in shapes: P prompts, N rollouts of a rollout step, B rollouts of a microbatch, T response
tokens (padded), S prompt plus response tokens (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

PolicyFactory = Callable[[], nn.Module]
OptimizerFactory = Callable[[Iterable], torch.optim.Optimizer]


@dataclass(frozen=True)
class Prompt:
    """One question with its gold answer.

    Attributes:
        id: stable across runs, splits, filters and shuffles; budgets are keyed by it.
        question: text of the user turn, before any template.
        answer: gold answer as text, without a box.
        solution: a worked solution, if the data has one (what `algo=sft` trains on).
        tags: anything to group results by, such as family and level.
        token_ids: the rendered prompt; empty until a template has encoded it.
    """

    id: str
    question: str
    answer: str
    solution: str | None = None
    tags: dict = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
