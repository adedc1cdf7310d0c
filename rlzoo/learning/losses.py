"""Losses: pure functions of named tensors that return weighted sums, never means.

Only the caller knows the divisor of the optimizer step, over all its microbatches and ranks.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_LOG_RATIO = 20.0  # nats; beyond it exp would overflow in time, and says nothing more
KLEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS = get_args(KLEstimator)


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
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
) -> LossOutput:
    """PPO's clipped surrogate, summed over response tokens (arXiv:1707.06347 Eq. 7).

    With r = exp(logprobs - old_logprobs), each token contributes
    -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A), times its weight. The log-ratio is held
    within 20 nats, so that nothing overflows.

    Args:
        logprobs: [B, T] log pi_theta(token), nats; carries gradient.
        old_logprobs: [B, T] log pi_old(token), nats; float32, no gradient.
        advantages: [B, T] one per token; a rollout's own value repeated, but for PPO.
        weights: [B, T] float32; 0 off the response. Holds the average that is wanted
            (token, sequence or fixed length) and any weight of the rollout.
        clip_low, clip_high: width of the clip range below and above r = 1; None does not clip.
        dual_clip: bounds the loss at -A * dual_clip where A < 0 (arXiv:1912.09729).
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, weights)
    return _clipped(log_ratio, advantages, weights, clip_low, clip_high, dual_clip)


def sequence_clipped_surrogate_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float | None = 3e-4,
    clip_high: float | None = 4e-4,
) -> LossOutput:
    """GSPO's surrogate: one ratio per response, the geometric mean of its tokens' ratios
    (arXiv:2507.18071 Eq. 5 and 7). The mean log-ratio is held within 20 nats, its tokens are not.

    Args:
        logprobs, old_logprobs, advantages, weights: [B, T], as in `clipped_surrogate_loss`.
        clip_low, clip_high: width of the clip range of the sequence ratio; the paper has 3e-4
            and 4e-4, since a mean over tokens strays far less than one token does.
    """
    log_ratio = torch.where(weights != 0, logprobs - old_logprobs, 0.0)
    lengths = (weights != 0).sum(-1, keepdim=True).clamp(min=1)
    mean = (log_ratio.sum(-1, keepdim=True) / lengths).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _clipped(mean.expand_as(log_ratio), advantages, weights, clip_low, clip_high, None)


def clipped_weight_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = 4.0,
) -> LossOutput:
    """CISPO: -sg(clip(r)) * A * log pi, so that a clipped token still has a gradient
    (arXiv:2506.13585 Eq. 4).

    Args:
        logprobs, old_logprobs, advantages, weights: [B, T], as in `clipped_surrogate_loss`.
        clip_low, clip_high: the weight is r held within [1 - clip_low, 1 + clip_high]; None does
            not bound that side.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, weights).detach()
    ratio = log_ratio.exp()
    clipped = _clip(ratio, clip_low, clip_high)
    kept = torch.where(weights != 0, logprobs, 0.0)
    metrics = {
        "approx_kl": (weights * (ratio - 1 - log_ratio)).sum(),
        "clip_fraction": (weights * (clipped != ratio)).sum(),
    }
    return LossOutput((weights * -clipped * advantages * kept).sum(), metrics)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None = None
) -> LossOutput:
    """Half the squared error of the critic, clipped around its values at sampling time
    (docs/formulas.md 3.6): 0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2).

    Args:
        values: [B, T] carries gradient; of the state before each token.
        old_values: [B, T] the same when the rollouts were scored, no gradient.
        returns: [B, T] what the values should have been.
        weights: [B, T] float32; 0 off the response.
        clip: half width; None does not clip.
    """
    error = (values - returns) ** 2
    was_clipped = torch.zeros_like(error)
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        clipped_error = (clipped - returns) ** 2
        was_clipped = (clipped_error > error).float()
        error = torch.max(error, clipped_error)
    half = torch.where(weights != 0, 0.5 * error, 0.0)
    metrics = {
        "value/loss": (weights * half).sum().detach(),
        "value/clip_fraction": (weights * was_clipped).sum().detach(),
        "value/mean": (weights * values).sum().detach(),
    }
    return LossOutput((weights * half).sum(), metrics)


def kl_estimate(logprobs: Tensor, other_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(pi || other) from tokens of pi, nats; same shape, has gradient.

    With d = other_logprobs - logprobs: k1 is -d, k2 is d^2 / 2, k3 is exp(d) - d - 1 with d held
    within [-10, 10] (docs/formulas.md 4.1; Schulman, "Approximating KL divergence"). As losses they
    differ more than as numbers: the gradient of k2 is that of the KL, the mean gradient of k1 is 0.
    """
    d = other_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        d = d.clamp(-10, 10)
        return d.exp() - d - 1
    raise ValueError(f"estimator must be one of {KL_ESTIMATORS}, got {estimator!r}")


def kl_to_reference(
    logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor, estimator: str = "k3"
) -> Tensor:
    """`kl_estimate` of KL(pi_theta || pi_ref), summed over response tokens; [] nats.

    Args:
        logprobs, ref_logprobs, weights: [B, T], as in `clipped_surrogate_loss`.
    """
    ours, theirs = (torch.where(weights != 0, x, 0.0) for x in (logprobs, ref_logprobs))
    return (weights * kl_estimate(ours, theirs, estimator)).sum()


def truncated_importance_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float
) -> Tensor:
    """[B, T] min(pi_old / pi_sampler, cap) of each token, 1 off the mask; no gradient.

    Corrects for an engine whose log-probs differ from the trainer's (Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training").

    Args:
        old_logprobs, sampler_logprobs: [B, T] nats.
        mask: [B, T] bool, response tokens.
        cap: largest weight, at least 1.
    """
    log_ratio = torch.where(mask, old_logprobs - sampler_logprobs, 0.0).detach()
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def engine_as_old(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float | None
) -> Tensor:
    """[B, T] old log-probs of a loss whose ratio is taken to the engine; no gradient.

    That is the engine's log-prob, or logprobs - log(cap) where it is less: the ratio is then
    min(pi_theta / pi_sampler, cap), with the gradient of log pi_theta where it is truncated.

    Args:
        logprobs, sampler_logprobs: [B, T] nats, of the policy being trained and of the engine.
        mask: [B, T] bool, response tokens.
        cap: largest ratio, at least 1; None does not truncate.
    """
    if cap is None:
        return sampler_logprobs
    floor = logprobs.detach() - math.log(cap)
    return torch.where(mask, torch.maximum(sampler_logprobs, floor), sampler_logprobs)


def dpo_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> Tensor:
    """[K] loss of each pair (arXiv:2305.18290 Eq. 7; IPO: arXiv:2310.12036 Eq. 17).

    With h the difference of the log-ratios: sigmoid is -(1 - e) log sigma(beta h)
    - e log sigma(-beta h) with e the label smoothing; ipo is (h - 1 / (2 beta))^2.

    Args:
        chosen_log_ratio, rejected_log_ratio: [K] log pi_theta - log pi_ref of whole responses,
            summed over tokens, nats.
        beta: how strongly the reference holds.
        label_smoothing: chance that a preference is the wrong way round, in [0, 0.5).
    """
    h = chosen_log_ratio - rejected_log_ratio
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if kind == "sigmoid":
        right, wrong = logsigmoid(beta * h), logsigmoid(-beta * h)
        return -(1 - label_smoothing) * right - label_smoothing * wrong
    raise ValueError(f"kind must be sigmoid or ipo, got {kind!r}")


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, weights: Tensor) -> Tensor:
    log_ratio = torch.where(weights != 0, logprobs - old_logprobs, 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clip(ratio: Tensor, low: float | None, high: float | None) -> Tensor:
    if low is not None:
        ratio = ratio.clamp(min=1 - low)
    return ratio if high is None else ratio.clamp(max=1 + high)


def _clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
) -> LossOutput:
    ratio = log_ratio.exp()
    clipped = _clip(ratio, clip_low, clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)  # [B, T]
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.min(loss, -advantages * dual_clip), loss)
    with torch.no_grad():
        approx_kl = ratio - 1 - log_ratio  # k3 estimate of KL(pi_old || pi_theta)
        was_clipped = clipped * advantages < ratio * advantages
        metrics = {
            "approx_kl": (weights * approx_kl).sum(),
            "clip_fraction": (weights * was_clipped).sum(),
            "clip_fraction/low": (weights * (was_clipped & (advantages < 0))).sum(),
            "clip_fraction/high": (weights * (was_clipped & (advantages > 0))).sum(),
        }
    return LossOutput((weights * loss).sum(), metrics)
