"""A key-value cache whose rows end at one column, grow in place, leave and are joined by others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SPARE_SHARE, LEAST_SPARE = 4, 32  # room to grow: a quarter of the longest row, and some columns


class SlabLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, length, dim], as views of larger buffers.

    transformers' own dynamic layer concatenates at every token, which copies the whole cache.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # has no types
        self.length = 0  # columns in use

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = key_states, value_states
            self.length = key_states.shape[2]
        else:
            end = self.length + key_states.shape[2]
            self._keys[:, :, self.length : end] = key_states
            self._values[:, :, self.length : end] = value_states
            self.length = end
        return self._look()

    def join(self, parts: Sequence[tuple[SlabLayer, Tensor, int]], capacity: int) -> None:
        """See `SlabCache.join`."""
        width = max(columns for *_, columns in parts)
        for name in ("_keys", "_values"):
            olds = [getattr(layer, name) for layer, *_ in parts]
            _, heads, _, dim = olds[0].shape
            new = olds[0].new_empty(sum(len(rows) for _, rows, _ in parts), heads, capacity, dim)
            first = 0
            for old, (layer, rows, columns) in zip(olds, parts, strict=True):
                place = new[first : first + len(rows)]
                place[:, :, : width - columns] = 0  # masked, but NaN would pass any mask
                kept = old[:, :, layer.length - columns : layer.length]
                torch.index_select(kept, 0, rows, out=place[:, :, width - columns : width])
                first += len(rows)
            setattr(self, name, new)
        if not self.is_initialized:
            self.lazy_initialization(self._keys, self._values)
        self.length = width
        self._look()

    def _look(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
        return self.keys, self.values


class SlabCache(Cache):
    """Keys and values of R rows, each of which ends at column `length`, whatever its own length."""

    def __init__(self, num_layers: int) -> None:
        self.slabs = [SlabLayer() for _ in range(num_layers)]
        self.capacity = 0  # columns that there is room for
        super().__init__(layers=[*self.slabs])

    @property
    def length(self) -> int:
        return self.slabs[0].length

    def join(self, parts: Sequence[tuple[SlabCache, Tensor, int]]) -> None:
        """Becomes rows of several caches, in order; one layer at a time is held twice.

        Args:
            parts: caches, of which this one may be the first, each with the rows that are taken of
                it and how many of its last columns those use. A row may be named more than once.
        """
        width = max(columns for *_, columns in parts)
        self.capacity = width + max(LEAST_SPARE, width // SPARE_SHARE)
        for index, slab in enumerate(self.slabs):
            slab.join([(cache.slabs[index], rows, n) for cache, rows, n in parts], self.capacity)
