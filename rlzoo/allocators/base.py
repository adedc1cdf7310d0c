"""What an allocator is: observe prompts, then share out responses. No models, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Allocator:
    """Shares responses out. This base plans once per epoch and keeps nothing: the rest is said anew
    where it differs."""

    max_rounds = 1  # draws of one rollout step; 1: none after the first

    def observe(
        self,
        prompt_ids: Sequence[str],
        rewards: Sequence[Sequence[float]],
        grad_norms: Sequence[float] | None = None,
    ) -> None:
        """What was seen of each prompt: its responses' rewards in [0, 1], and the mean gradient
        norm of its correct responses (0 if there was none)."""

    def allocate(self, prompt_ids: Sequence[str], total: int) -> list[int]:
        """Budgets in the order of `prompt_ids`, each >= 0, of sum exactly `total`."""
        raise NotImplementedError

    def done(self, prompt_id: str) -> bool:
        """Whether a prompt needs no further round within this rollout step."""
        return True

    def bounds(self, prompts: int, total: int) -> tuple[int, int]:
        """The least and the most responses that `allocate` may give to one prompt.

        Raises:
            UserError: no budgets within the allocator's own bounds have that sum.
        """
        return 0, total

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`."""


def round_to_total(
    shares: np.ndarray, total: int, low: np.ndarray | int = 0, high: np.ndarray | int | None = None
) -> list[int]:
    """Integers near `total * shares`, within bounds, of sum exactly `total`.

    Each is rounded to nearest (half to even); what is over or missing is then taken from or given
    to the entries rounded furthest the other way (docs/formulas.md 9.4). Bounds are kept by
    water-filling: entries at a bound are fixed there and the rest is shared out anew.

    Args:
        shares: [P] >= 0, of positive sum.
        total: responses.
        low, high: bounds of each entry; no upper bound if None.

    Raises:
        ValueError: bounds that no integers of that sum satisfy.
    """
    shares = np.where(shares < 1e-12 * shares.max(), 0.0, shares)  # too small to scale safely
    low = np.broadcast_to(np.asarray(low, float), shares.shape)
    top = np.broadcast_to(np.asarray(np.inf if high is None else high, float), shares.shape)
    if not low.sum() <= total <= top.sum():
        raise ValueError(f"no budgets between {low.sum()} and {top.sum()} sum to {total}")
    wanted = fill(shares, total, low, top)
    counts = np.clip(np.rint(wanted), low, top)
    while (rest := total - int(counts.sum())) != 0:
        step = 1 if rest > 0 else -1
        room = (counts + step <= top) & (counts + step >= low)
        if step > 0 and (room & (shares > 0)).any():
            room &= shares > 0
        gap = np.where(room, step * (wanted - counts), -np.inf)
        chosen = np.argsort(-gap, kind="stable")[: min(abs(rest), int(room.sum()))]
        counts[chosen] += step
    return [int(count) for count in counts]


def fill(shares: np.ndarray, total: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[P] clip(level * shares, low, high) with the level that makes the sum `total`.

    Entries of share 0 take what is left only when every other one is full.
    """
    positive = shares > 0
    if np.where(positive, high, low).sum() < total:
        spare = total - np.where(positive, high, low).sum()
        even = fill(
            np.where(positive, 0.0, 1.0), spare + low[~positive].sum(), low * ~positive, high
        )
        return np.where(positive, high, even)
    below, above = 0.0, 1.0
    while np.clip(above * shares, low, high).sum() < total:
        above *= 2
    for _ in range(200):
        middle = (below + above) / 2
        enough = np.clip(middle * shares, low, high).sum() >= total
        below, above = (below, middle) if enough else (middle, above)
    spread: np.ndarray = np.clip(above * shares, low, high)
    return spread
