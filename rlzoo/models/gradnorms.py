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

CHUNK_ELEMENTS = 2**25  # logits of one response held at once, elements of float32 (128 MiB)


def head_gradient_norms(
    hidden: Sequence[Tensor],
    head_weight: Tensor,
    tokens: Sequence[Tensor],
    temperature: float,
    head_bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
) -> Tensor:
    """|| d/dW sum_t log pi(token_t) ||_2 of each response; [B] float32.

    Uses the Gram form sum_{t,s} (delta_t . delta_s)(h_t . h_s) when T < D and the matrix itself
    otherwise; both are exact sums over the vocabulary, which is walked in chunks, for all responses
    together: neither [T, V] nor a float32 copy of the head stands in memory whole. Under autocast
    the products are of its precision. A tied head is treated as a matrix of its own.

    Args:
        hidden: B x [T, D] last hidden states at the positions that predict the tokens.
        head_weight: [V, D].
        tokens: B x [T] int64.
        temperature: of sampling; logits are divided by it.
        head_bias: [V], if the head has one; its own gradient is not part of the norm.
        transform: from the head's output to the model's logits.
    """
    hidden = [h.float() for h in hidden]
    longest = max(1, *(len(t) for t in tokens))  # a rank without responses has one blank row
    size = max(1, CHUNK_ELEMENTS // longest)
    starts = range(0, len(head_weight), size)
    log_norms: list[Tensor | None] = [None] * len(hidden)

    def logits(start: int) -> list[Tensor]:
        weight = head_weight[start : start + size].float()
        bias = None if head_bias is None else head_bias[start : start + size]
        return [transform(torch.nn.functional.linear(h, weight, bias)) for h in hidden]

    if len(starts) > 1:
        parts = [[(y / temperature).logsumexp(-1) for y in logits(start)] for start in starts]
        log_norms = [torch.stack(row).logsumexp(0) for row in zip(*parts, strict=True)]
    sums: list[list[Tensor]] = [[] for _ in hidden]
    for start in starts:
        for i, y in enumerate(logits(start)):
            delta = logit_gradients(y, tokens[i] - start, temperature, log_norms[i], transform)
            if gram_is_smaller(hidden[i]):
                sums[i] = [sum(sums[i], delta @ delta.T)]  # [T, T]
            else:
                sums[i].append((delta.T @ hidden[i]).norm())
    return torch.stack([norm_of(part, h) for part, h in zip(sums, hidden, strict=True)])


def logit_gradients(
    logits: Tensor,
    places: Tensor,
    temperature: float,
    log_norm: Tensor | None,
    transform: LogitTransform,
) -> Tensor:
    """[T, v] derivative of each token's log-prob with respect to the head's output, in a chunk.

    Args:
        logits: [T, v] of the chunk.
        places: [T] of the tokens, counted from where the chunk begins; others lie outside of it.
        log_norm: [T] over the whole vocabulary; None if the chunk is all of it.
    """
    tempered = logits / temperature
    probs = tempered.softmax(-1) if log_norm is None else (tempered - log_norm[:, None]).exp()
    delta = -probs
    rows = ((places >= 0) & (places < logits.shape[1])).nonzero()[:, 0]
    delta[rows, places[rows]] += 1
    delta = delta / temperature
    return delta if transform == PLAIN else delta * transform.slope(logits)


def gram_is_smaller(hidden: Tensor) -> bool:
    return hidden.shape[0] < hidden.shape[1]


def norm_of(parts: list[Tensor], hidden: Tensor) -> Tensor:
    if gram_is_smaller(hidden):
        return (parts[0] * (hidden @ hidden.T)).sum().clamp(min=0).sqrt()
    return parts[0] if len(parts) == 1 else torch.stack(parts).norm()
