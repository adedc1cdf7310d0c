"""Losses: pure functions of named tensors that return weighted sums, never means.

Only the caller knows the divisor of the optimizer step, over all its microbatches and ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossOutput(NamedTuple):
    loss_sum: Tensor  # []  weighted sum over response tokens, carries the graph
    metrics: dict[str, Tensor]  # each []  weighted sums over response tokens, detached


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> LossOutput:
    """-A * log pi summed over response tokens: no ratio, no clip (RAFT; arXiv:2504.11343 Eq. 1).

    Args:
        logprobs: [B, T] log pi_theta(token), nats; carries gradient.
        advantages: [B, T] one per token; a rollout's own value repeated.
        weights: [B, T] float32; 0 off the response, holds the average that is wanted.
    """
    kept = torch.where(weights != 0, logprobs, 0.0)
    return LossOutput((weights * -advantages * kept).sum(), {})


def clipped_surrogate_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> LossOutput:
    """PPO's clipped surrogate, summed over response tokens (arXiv:1707.06347 Eq. 7).

    With r = exp(logprobs - old_logprobs), each token contributes
    -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A), times its weight.

    Args:
        logprobs: [B, T] log pi_theta(token), nats; carries gradient.
        old_logprobs: [B, T] log pi_old(token), nats; float32, no gradient.
        advantages: [B, T] one per token; a rollout's own value repeated, but for PPO.
        weights: [B, T] float32; 0 off the response. Holds the average that is wanted
            (token, sequence or fixed length) and any weight of the rollout.
        clip_low, clip_high: width of the clip range below and above r = 1.
        dual_clip: bounds the loss at -A * dual_clip where A < 0 (arXiv:1912.09729).
    """
    log_ratio = torch.where(weights != 0, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)  # [B, T]
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.min(loss, -advantages * dual_clip), loss)
    with torch.no_grad():
        approx_kl = ratio - 1 - log_ratio  # k3 estimate of KL(pi_old || pi_theta)
        was_clipped = (clipped * advantages < ratio * advantages).float()
        metrics = {
            "approx_kl": (weights * approx_kl).sum(),
            "clip_fraction": (weights * was_clipped).sum(),
        }
    return LossOutput((weights * loss).sum(), metrics)


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor) -> Tensor:
    """k3 estimate of KL(pi_theta || pi_ref), summed over response tokens; [] nats.

    exp(d) - d - 1 with d = ref_logprobs - logprobs clamped to [-10, 10] (algorithms.md 0.6).

    Args:
        logprobs, ref_logprobs, weights: [B, T], as in `clipped_surrogate_loss`.
    """
    d = torch.where(weights != 0, ref_logprobs - logprobs, 0.0).clamp(-10, 10)
    return (weights * (d.exp() - d - 1)).sum()
