"""Whole parameters from sharded ones, one at a time, so that no process holds the model twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor


def gathered(named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter whole, by its name; collective: every rank walks the iterator in step.

    FSDP's DTensors are gathered as they are asked for; a parameter that is whole is passed on as it
    is. What is yielded may be kept: it is no buffer that the next step overwrites.
    """
    for name, parameter in named_parameters:
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
