"""Whether weights are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlzoo.ranks.exchange import world


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of `broken_weights`, or None."""
    return next(iter(broken_weights(named)), None)


@torch.no_grad()
def broken_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors that hold NaN or inf; of sharded ones, this rank's part is looked at.

    Reads every weight once, and waits for a GPU once.
    """
    names, ends = [], []
    for name, tensor in named:
        part = own_part(tensor)
        if part.numel() and part.is_floating_point():
            names.append(name)
            ends.append(torch.stack(part.detach().aminmax()).float())  # NaN is its own minimum
    if not names:
        return []
    finite = torch.stack([pair.to(ends[0].device) for pair in ends]).isfinite().all(-1)
    return [name for name, good in zip(names, finite.tolist(), strict=True) if not good]


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, unless it is sharded."""
    if hasattr(tensor, "ds_tensor") and hasattr(tensor, "ds_numel"):  # ZeRO-3's
        part: Tensor = tensor.ds_tensor.flatten()  # the last one ends in memory nobody has written
        return part[: max(0, tensor.ds_numel - world()[0] * part.numel())]
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # FSDP's
