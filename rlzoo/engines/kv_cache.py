"""A key-value cache that grows in place and drops rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SlabLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, length, dim], as views of larger buffers.

    transformers' own dynamic layer concatenates at every token, which copies the whole cache.
    """

    def __init__(self, spare: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # has no types
        self.spare, self.length = spare, 0  # tokens of room kept when the buffer is made

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, new, dim = key_states.shape
            self._keys = key_states.new_empty(rows, heads, new + self.spare, dim)
            self._values = value_states.new_empty(
                rows, heads, new + self.spare, value_states.shape[-1]
            )
        end = self.length + key_states.shape[2]
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def take_rows(self, rows: Tensor) -> None:
        """Keeps the rows named, in that order; a row may be named more than once."""
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            torch.index_select(old[:, :, : self.length], 0, rows, out=new[:, :, : self.length])
            setattr(self, name, new)
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]


class SlabCache(Cache):
    """A cache for a prefill of P prompts and up to `spare` more tokens of each row."""

    def __init__(self, num_layers: int, spare: int) -> None:
        self.slabs = [SlabLayer(spare) for _ in range(num_layers)]
        super().__init__(layers=[*self.slabs])

    def take_rows(self, rows: Tensor) -> None:
        for layer in self.slabs:
            layer.take_rows(rows)
