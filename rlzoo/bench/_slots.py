"""Counts what a model is made to compute: calls of its modules of one kind, and the tokens in them,
padding included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def slots_counted(
    phase: Callable[[], str] = lambda: "all", of: type[nn.Module] = nn.Embedding
) -> Iterator[Counter[str]]:
    """While it lasts, counts passes and slots by phase: "passes/PHASE", "slots/PHASE".

    Args:
        phase: names what is being done at the moment.
        of: modules whose calls are the passes. One of the embedding is one forward pass of the
            backbone, whoever makes it; layers are called again where gradient checkpointing
            computes them anew. Their first argument has ids, or hidden states of the last axis.
    """
    counts: Counter[str] = Counter()
    forward: Any = of.forward

    def counted(self: nn.Module, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = phase()
        counts[f"passes/{name}"] += 1
        counts[f"slots/{name}"] += given.numel() // (
            given.shape[-1] if given.is_floating_point() else 1
        )
        return forward(self, given, *args, **kwargs)

    setattr(of, "forward", counted)  # noqa: B010 (mypy takes no method for a variable)
    try:
        yield counts
    finally:
        setattr(of, "forward", forward)  # noqa: B010
