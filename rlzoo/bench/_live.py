"""Counts the bytes of all tensors that live, and the most that ever lived at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Within it, every storage that an operator makes is counted for as long as it lives.

    What a kernel takes and gives back within one operation is not seen, nor what a library holds.
    Works on fake tensors too, which have sizes and no memory.

    Args:
        found_too: counts what stood there before as well, as soon as an operator gives back it or
            a view of it: weights that were read from a file.

    Attributes:
        now, peak: bytes, of all storages.
        largest: bytes, of one storage.
    """

    def __init__(self, found_too: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # has no types
        self.found_too = found_too
        self.now = self.peak = self.largest = 0
        self.known: set[int] = set()  # by the address of what torch keeps for a storage

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = () if self.found_too else tree_leaves((args, kwargs))
        before = {key(leaf) for leaf in given if isinstance(leaf, Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and key(leaf) not in before | self.known:
                self.count(leaf)
        return found

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size, name = storage.nbytes(), key(tensor)
        self.known.add(name)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self.freed, name, size).atexit = False

    def freed(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.now -= size


def key(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` have at once."""
    live = Live()
    with live:
        run()
    return live.peak
