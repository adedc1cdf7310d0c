"""From logits and uniforms to tokens, by inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor

from rlzoo.engines.base import SamplingParams

NEAR_TIE = 1e-5  # width, in probability, within which rounding may decide a token
BLOCK = 512  # neighbours in the vocabulary whose mass is summed up before one of them is looked for


def draw(logits: Tensor, noise: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF, or the likeliest one at temperature 0.

    The CDF is taken of blocks of the vocabulary first, then, in float64, within the block that the
    uniform falls into: a float64 CDF of [R, V] would take several times as long as the rest.

    Args:
        logits: [R, V] float32.
        noise: [R] float64 uniforms in [0, 1).
        params: logits are divided by the temperature, then tokens outside of top-k and top-p are
            left out; temperature 0 is greedy, with log-probs at temperature 1.

    Returns:
        tokens [R] int64, log-probs [R] float32, near ties [R] bool: whether the uniform lies
        within NEAR_TIE of a step of the cumulative distribution.
    """
    if params.temperature not in (0, 1):
        logits = logits / params.temperature
    logits = truncated(logits, params)
    if params.temperature == 0:
        top = logits.log_softmax(-1).topk(2, dim=-1)
        return top.indices[:, 0], top.values[:, 0], top.values[:, 0] - top.values[:, 1] < NEAR_TIE
    probs, size = logits.softmax(-1), logits.shape[1]
    cut = size - size % BLOCK
    blocks = probs[:, :cut].unflatten(1, (-1, BLOCK)).sum(-1)
    masses = torch.cat([blocks, probs[:, cut:].sum(-1, keepdim=True)], dim=1).double()
    ends = masses.cumsum(-1)  # [R, blocks]
    target = noise[:, None] * ends[:, -1:]
    block = first_past(ends, target)
    share = 1 - (ends.gather(1, block) - target) / masses.gather(1, block)  # of the block's mass
    tokens = block * BLOCK + torch.arange(BLOCK, device=logits.device)  # [R, BLOCK]
    inside = probs.gather(1, tokens.clamp(max=size - 1)).double() * (tokens < size)
    steps = inside.cumsum(-1)
    target = share * steps[:, -1:]
    place = first_past(steps, target)
    token, step = tokens.gather(1, place), steps.gather(1, place)
    tie = (step - target < NEAR_TIE) & (token < size - 1)
    tie |= (target - step + inside.gather(1, place) < NEAR_TIE) & (token > 0)
    return token[:, 0], probs.gather(1, token)[:, 0].log(), tie[:, 0]


def first_past(ends: Tensor, target: Tensor) -> Tensor:
    """[R, 1] index of the first end past the target, or else of the last that has any mass."""
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    found = torch.searchsorted(ends, target, right=True)
    return torch.minimum(found, last).clamp(max=ends.shape[1] - 1)  # where all is NaN


def truncated(logits: Tensor, params: SamplingParams) -> Tensor:
    """[R, V] logits, -inf for tokens outside of the top k and of the top p."""
    if not 0 < params.top_k < logits.shape[-1] and params.top_p >= 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    out = probs.cumsum(-1) - probs >= params.top_p  # mass of likelier tokens
    if params.top_k:
        out[:, params.top_k :] = True
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
