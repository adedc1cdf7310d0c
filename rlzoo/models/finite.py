"""Whether weights are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or inf, or None; of sharded ones, this rank's part.

    Reads every weight once, and waits for a GPU once.
    """
    names, sums = [], []
    for name, tensor in named:
        part = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3's own part
        part = part.to_local() if hasattr(part, "to_local") else part  # FSDP's
        if part.numel() and part.is_floating_point():
            names.append(name)
            # Of float32 sums: a float16 one overflows. Two infinities of opposite signs make a NaN.
            sums.append(part.sum(dtype=torch.float32))
    if not sums:
        return None
    bad = ~torch.isfinite(torch.stack([each.to(sums[0].device) for each in sums]))
    return names[int(bad.nonzero()[0])] if bad.any() else None
