"""Counts what a model is made to compute: calls of its embedding, and the tokens in them, padding
included. One call is one forward pass of the backbone, whoever makes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def slots_counted(phase: Callable[[], str]) -> Iterator[Counter[str]]:
    """While it lasts, counts forward passes and slots by phase: "passes/PHASE", "slots/PHASE".

    Args:
        phase: names what is being done at the moment.
    """
    counts: Counter[str] = Counter()
    forward = nn.Embedding.forward

    def counted(self: nn.Embedding, input: Tensor) -> Tensor:
        name = phase()
        counts[f"passes/{name}"] += 1
        counts[f"slots/{name}"] += input.numel()
        return forward(self, input)

    setattr(nn.Embedding, "forward", counted)  # noqa: B010 (mypy takes no method for a variable)
    try:
        yield counts
    finally:
        setattr(nn.Embedding, "forward", forward)  # noqa: B010
