"""Gradient norms of a response's log-likelihood, in closed form at the output head.

With last hidden states h_t and delta_t = (onehot(a_t) - softmax(z_t / tau)) / tau, the gradient of
sum_t log pi(a_t) with respect to the head is sum_t delta_t h_t^T: no backward pass is needed. The
norm is what GVM asks of each accepted pilot (arXiv:2505.02391 section 3; algorithms.md 2.2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def head_gradient_norm(
    hidden: Tensor, head_weight: Tensor, tokens: Tensor, temperature: float, head_bias: Tensor | None = None
) -> Tensor:
    """|| d/dW sum_t log pi(token_t) ||_2 for one response; [] float32.

    Uses the Gram form sum_{t,s} (delta_t . delta_s)(h_t . h_s) when T < D and the matrix itself
    otherwise; both are exact. A tied head is treated as a matrix of its own.

    Args:
        hidden: [T, D] last hidden states at the positions that predict the tokens.
        head_weight: [V, D].
        tokens: [T] int64.
        temperature: of sampling; logits are divided by it.
        head_bias: [V], if the head has one; its own gradient is not part of the norm.
    """
    hidden, weight = hidden.float(), head_weight.float()
    logits = torch.nn.functional.linear(hidden, weight, head_bias)
    delta = -(logits / temperature).softmax(-1)  # [T, V]
    delta[torch.arange(len(tokens), device=tokens.device), tokens] += 1
    delta = delta / temperature
    if hidden.shape[0] < hidden.shape[1]:
        gram = (delta @ delta.T) * (hidden @ hidden.T)  # [T, T]
        return gram.sum().clamp(min=0).sqrt()
    return (delta.T @ hidden).norm()
