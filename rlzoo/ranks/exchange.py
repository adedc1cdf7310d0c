"""The one thing ranks exchange here: small Python objects. Alone, a rank exchanges with itself."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from rlzoo.ranks.whereabouts import HERE

# The process group and the one made beside it. Torch alone keeps them: one that outlives its end,
# until the interpreter's, may abort the process.
_made: tuple[Callable[[], ProcessGroup | None], ...] = (lambda: None, lambda: None)


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_gather(item: Any) -> list[Any]:
    """Every rank's item, in order of rank; collective.

    Items are pickled and travel over gloo, in host memory, whatever the strategy's group uses. A
    rank that waits here long is named together with the function that called.
    """
    _, size = world()
    if size == 1:
        return [item]
    items = [None] * size
    with HERE.waiting(sys._getframe(1).f_code.co_qualname):
        dist.all_gather_object(items, item, group=talking_group())
    return items


def talking_group() -> ProcessGroup | None:
    """A gloo group of all ranks, made at the first call; collective then. Its time-out is that of
    the group that it stands beside: `strategy.timeout`."""
    global _made
    whole = dist.group.WORLD
    if whole is None or dist.get_backend() == "gloo":
        return whole
    beside, group = (made() for made in _made)
    if beside is not whole or group is None:  # the first, or one that was ended and begun anew
        group = dist.new_group(backend="gloo", timeout=exchange_timeout(whole))
        _made = (weakref.ref(whole), weakref.ref(group))
    return group


def exchange_timeout(whole: ProcessGroup) -> timedelta:
    """How long a process of this group waits for the others in one exchange."""
    return whole._get_backend(whole._device_types[0]).options._timeout  # no public place has it
