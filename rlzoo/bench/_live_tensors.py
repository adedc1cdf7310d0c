"""Counts the bytes of tensors while code runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within it, every storage that an operator makes is counted for as long as it lives.

    What stood before is not counted, nor what an operator's own kernel frees before it returns.
    Works on fake tensors too, which have sizes and no memory.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0  # bytes, of all storages
        self.largest = 0  # bytes, of one storage
        self.known: set[int] = set()  # by the address of what torch keeps for a storage

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and key(tensor) not in before | self.known:
                self.count(tensor)
        return found

    def count(self, tensor: Tensor) -> None:
        size, name = tensor.untyped_storage().nbytes(), key(tensor)
        self.known.add(name)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(tensor.untyped_storage(), self.freed, name, size).atexit = False

    def freed(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.now -= size


def key(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` have at once."""
    live = LiveTensors()
    with live:
        run()
    return live.peak
