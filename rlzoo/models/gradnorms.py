"""Gradient norms of a response's log-likelihood, in closed form at the output head.

With last hidden states h_t, the head's output z_t, logits y_t = f(z_t) (`rlzoo.models.logits`) and
delta_t = (onehot(a_t) - softmax(y_t / tau)) / tau * f'(z_t), the gradient of sum_t log pi(a_t) with
respect to the head is sum_t delta_t h_t^T: no backward pass is needed. The norm is what GVM asks of
each accepted pilot (arXiv:2505.02391 section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlzoo.models.logits import PLAIN, LogitTransform
from rlzoo.models.tiles import (
    Head,
    Places,
    RunningSoftmax,
    add_product,
    full_precision,
    logit_gradient,
    product_dtype,
    slices,
    softmax_of,
    square_side,
)

GRAM_UP_TO = 2  # widths of the hidden states; beyond, the gradient itself costs less, in memory too
GRAM_ROWS = 64  # of a Gram matrix at once: what lies above the diagonal is not computed


@torch.no_grad()
def head_gradient_norms(
    hidden: Sequence[Tensor],
    head_weight: Tensor,
    tokens: Sequence[Tensor],
    temperature: float,
    head_bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
) -> Tensor:
    """|| d/dW sum_t log pi(token_t) ||_2 of each response; [B] float32.

    Takes the Gram form sum_{t,s} (delta_t . delta_s)(h_t . h_s) of responses up to `GRAM_UP_TO`
    times as long as hidden states are wide, out of the walk that finds the softmax, and the matrix
    itself of longer ones. Both are exact sums over the vocabulary. Under autocast the products are
    of its precision. A tied head is treated as a matrix of its own.

    Args:
        hidden: B x [T, D] last hidden states at the positions that predict the tokens.
        head_weight: [V, D].
        tokens: B x [T] int64.
        temperature: of sampling; logits are divided by it.
        head_bias: [V], if the head has one; its own gradient is not part of the norm.
        transform: from the head's output to the model's logits.
    """
    head = Head(head_weight, head_bias, product_dtype(head_weight), temperature, transform)
    norms = torch.zeros(len(hidden), device=head_weight.device)
    short = [i for i, h in enumerate(hidden) if h.shape[0] <= GRAM_UP_TO * h.shape[1]]
    with full_precision(head_weight):
        if short:
            norms[short] = gram_norms(head, [hidden[i] for i in short], [tokens[i] for i in short])
        for i in set(range(len(hidden))).difference(short):
            norms[i] = matrix_norm(head, hidden[i], tokens[i])
    return norms


def matrix_norm(head: Head, hidden: Tensor, tokens: Tensor) -> Tensor:
    """[] norm of one response, of the gradient made part by part; the softmax is found before."""
    states, ones = hidden.to(head.dtype), torch.ones_like(tokens, dtype=torch.float32)
    log_norm = softmax_of(states, head, tokens).log_norm
    parts = []
    for columns, part in head.parts([slice(0, len(tokens))]):
        logits, places = part.logits(states), Places.of(tokens, columns)
        delta = logit_gradient(part, logits, places, log_norm, ones)
        parts.append((delta.to(head.dtype).T @ states).float().norm())
    norm: Tensor = torch.stack(parts).norm()
    return norm


def gram_norms(head: Head, hidden: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """[B] norms from one walk.

    With q_t = 1 - p_t(a_t), and p'_t the softmax without the token's own place, delta_t is
    (q_t onehot(a_t) - p'_t) f' / tau: sums of p'_t . p'_s run along with the softmax, and no
    difference of nearly equal numbers is taken, however sure of its tokens the policy is.
    """
    states, ids = torch.cat(list(hidden)).to(head.dtype), torch.cat(list(tokens))
    lengths = [len(t) for t in tokens]
    blocks = whole_responses(lengths, square_side(ids.device))
    grams = [ids.new_zeros(n, n, dtype=torch.float32) for n in lengths]
    softmax = RunningSoftmax(ids)
    for columns, part in head.parts([rows for rows, _ in blocks]):
        for rows, members in blocks:
            logits, places = part.logits(states[rows]), Places.of(ids[rows], columns)
            slope = part.slope(logits)
            weights, decay = softmax.add(rows, logits, places)
            if isinstance(slope, Tensor):
                weights *= slope
            cut = [x.split([lengths[i] for i in members]) for x in (weights.to(head.dtype), decay)]
            for i, weight, kept in zip(members, *cut, strict=True):
                add_to_gram(grams[i], weight, kept)
    found = (states, ids, softmax.log_norm, softmax.mass, softmax.others)
    own = zip(*(tensor.split(lengths) for tensor in found), strict=True)
    return torch.stack(
        [gram_norm(head, gram, *each) for gram, each in zip(grams, own, strict=True)]
    )


def gram_norm(
    head: Head,
    gram: Tensor,
    states: Tensor,
    tokens: Tensor,
    log_norm: Tensor,
    mass: Tensor,
    others: Tensor,
) -> Tensor:
    """[] norm of one response.

    Args:
        gram: [T, T] sums of `weights` of two tokens times each other; see `add_to_gram`.
        mass, others: [T] sums of a token's `weights`, with its own place and without.
    """
    at_tokens = head.part(tokens)
    logits = at_tokens.logits(states)  # [T, T] of each token's place at each position
    slope = at_tokens.slope(logits)
    same = tokens[:, None] == tokens
    probs = (logits - log_norm[:, None]).exp().masked_fill(same, 0)
    q = others / mass
    if isinstance(slope, Tensor):
        probs, q = probs * slope, q * slope.diagonal()
    lower = gram.tril() / mass[:, None] / mass
    deltas = lower + lower.tril(-1).T - 2 * probs * q + same * q[:, None] * q
    states = states.float()
    norm = (deltas * (states @ states.T)).sum().clamp(min=0).sqrt()
    return norm if isinstance(slope, Tensor) else norm * slope


def add_to_gram(gram: Tensor, weights: Tensor, decay: Tensor) -> None:
    """Takes in one tile of a response, in blocks of rows up to the diagonal.

    Args:
        gram: [T, T] of the tiles before.
        weights: [T, v] exp(logit - top), 0 at each token itself, times the slope if that varies.
        decay: [T] what the sums so far are multiplied by.
    """
    gram.mul_(decay[:, None]).mul_(decay)
    for rows in slices(len(weights), GRAM_ROWS):
        add_product(gram[rows, : rows.stop], weights[rows], weights[: rows.stop].T)


def whole_responses(lengths: Sequence[int], most: int) -> list[tuple[slice, list[int]]]:
    """Blocks of tokens of whole responses, one after the other, and the responses of each.

    Args:
        most: tokens of a block, unless one response has more.
    """
    blocks: list[tuple[slice, list[int]]] = []
    start = 0
    for i, length in enumerate(lengths):
        if blocks and start + length - blocks[-1][0].start <= most:
            rows, members = blocks.pop()
            blocks.append((slice(rows.start, start + length), [*members, i]))
        else:
            blocks.append((slice(start, start + length), [i]))
        start += length
    return blocks
