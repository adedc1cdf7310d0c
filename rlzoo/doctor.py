"""Does the engine draw from the policy that is trained? Figures of the gap, and where it comes from.

Gaps are |trainer - engine| log-probs of the same tokens and weights, nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FAR = 0.1  # nats; tokens further apart are counted
EXACT = 1e-3  # nats; a mean below is rounding of float32
APART = 0.01  # nats; a mean above is more than half precision alone


def gap_figures(gaps: Tensor) -> dict[str, float]:
    """Mean, 99th percentile, largest, and the share of tokens over 0.1 nats; {} for no token."""
    if not gaps.numel():
        return {}
    gaps = gaps.double()
    rank = max(1, round(0.99 * gaps.numel()))
    return {
        "logprob_gap/mean": float(gaps.mean()),
        "logprob_gap/p99": float(gaps.kthvalue(rank).values),
        "logprob_gap/max": float(gaps.max()),
        "logprob_gap/far": float((gaps > FAR).double().mean()),
    }


def likely_cause(
    gaps: Sequence[Tensor], probe_gap: float | None = None, probe_limit: float = APART
) -> str:
    """What most likely sets engine and trainer apart.

    Args:
        gaps: of each rollout, [L] in order of its tokens.
        probe_gap: mean gap of `rlzoo.engines.probe` at temperature 1, where it was asked for.
        probe_limit: mean gap of the probe that number formats alone can explain.
    """
    gaps = [gap.double() for gap in gaps if len(gap) > 2]
    mean = float(torch.cat(gaps).mean()) if gaps else 0.0
    if mean <= EXACT:
        return "none: the difference is rounding"
    inner = float(torch.cat([gap[1:-1] for gap in gaps]).mean())
    first = float(torch.stack([gap[0] for gap in gaps]).mean())
    last = float(torch.stack([gap[-1] for gap in gaps]).mean())
    if last > 10 * inner and last > 10 * first:
        return "how a response ends: the engine stops at other tokens than the tokenizer's end"
    if first > 10 * inner and first > 10 * last:
        return "the prompt: the engine saw other prompt tokens, or another template"
    if probe_gap is not None and probe_gap > probe_limit:
        return "the weights: a weight sync left some of them as they were"
    if mean <= APART:
        return "precision: the engine computes in another dtype than the trainer"
    if probe_gap is not None:
        return "the sampling settings: another temperature, top-p or top-k in the engine"
    return "a weight sync that failed, another temperature or top-p in the engine, or another dtype"


def verdict(figures: dict[str, float], cause: str, limit: float) -> str:
    """One line for the user.

    Args:
        figures: of `gap_figures`.
        limit: `algo.max_logprob_gap`, mean nats.
    """
    mean = figures["logprob_gap/mean"]
    word = "agree" if mean <= EXACT else "differ a little" if mean <= limit else "differ"
    numbers = (
        f"mean {mean:.2g}, p99 {figures['logprob_gap/p99']:.2g}, max"
        f" {figures['logprob_gap/max']:.2g} nats a token, {100 * figures['logprob_gap/far']:.2g}%"
        f" of tokens over {FAR}"
    )
    mend = "" if mean <= EXACT else " algo.tis_cap=2 corrects for it."
    reason = "" if mean <= EXACT else f" Likely cause: {cause}.{mend}"
    return f"Engine and trainer {word}: {numbers}.{reason}"
