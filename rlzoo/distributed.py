"""The one thing ranks exchange here: small Python objects. Alone, a rank exchanges with itself."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_gather(item: Any) -> list[Any]:
    """Every rank's item, in order of rank; collective."""
    _, size = world()
    if size == 1:
        return [item]
    items = [None] * size
    dist.all_gather_object(items, item)
    return items
