"""Counts the bytes of all tensors that live, and the most that ever lived at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """While it is on, every storage that an operation makes is counted until it is freed.

    What a kernel takes and gives back within one operation is not seen, nor what a library holds.

    Attributes:
        now, peak: bytes, of storages that were seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # has no types
        self.now = self.peak = 0
        self._known: set[int] = set()

    def look_at(self, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of these."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place, size = id(storage), storage.nbytes()
            if place not in self._known and size:
                self._known.add(place)
                self.now += size
                weakref.finalize(storage, self._freed, place, size)
        self.peak = max(self.peak, self.now)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.look_at(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        return found
