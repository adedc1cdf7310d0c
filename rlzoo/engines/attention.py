"""Attention of one new token a row to the keys and values that the row has, on any device.

`sdpa` of transformers repeats keys and values for every head of a group as soon as there is a mask
(rows of several lengths have one), which copies the whole cache at each token. Here the heads of a
group stand where queries stand, and rows are passed over in blocks of like length, so that each
block reads what its longest row needs. Passes of more tokens are `sdpa`'s own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlzoo_decoding"  # as transformers' attn_implementation
BLOCK_SHARE, LEAST_COLUMNS = 8, 64  # rows of a block differ by less than that of the longest row


class Block(NamedTuple):
    """Neighbouring rows, none of which has a token left of column `start`."""

    first: int
    last: int  # exclusive
    start: int


def blocks_of(starts: Sequence[int], width: int) -> list[Block]:
    """Rows cut into blocks; fewest where the longest come first.

    Args:
        starts: first column of each row's own tokens.
        width: columns.
    """
    blocks: list[Block] = []
    apart = max(LEAST_COLUMNS, width // BLOCK_SHARE)
    low = high = first = 0
    for row, start in enumerate(starts):
        if row == first:
            low = high = start
        elif max(high, start) - min(low, start) > apart:
            blocks.append(Block(first, row, low))
            first, low, high = row, start, start
        low, high = min(low, start), max(high, start)
    return [*blocks, Block(first, len(starts), low)]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    row_blocks: Sequence[Block] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers'.

    Args:
        query: [R, heads, Q, dim]. key, value: [R, groups, S, dim].
        attention_mask: [R, 1, Q, S] bool, True where a token is looked at.
        row_blocks: given where Q is 1.
    """
    if row_blocks is None or query.shape[2] > 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    rows, heads = query.shape[:2]
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])  # [R, groups, heads of one, D]
    parts = [
        scaled_dot_product_attention(
            grouped[first:last],
            key[first:last, :, start:],
            value[first:last, :, start:],
            None if attention_mask is None else attention_mask[first:last, ..., start:],
            scale=scaling,
        )
        for first, last, start in row_blocks
    ]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.reshape(rows, 1, heads, -1), None


def mask(
    *,
    q_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers': a view of the [R, S] mask where one token looks back."""
    if q_length == 1 and attention_mask is not None and local_size is None and not use_vmap:
        return attention_mask[:, None, None]
    return sdpa_mask(
        q_length=q_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
