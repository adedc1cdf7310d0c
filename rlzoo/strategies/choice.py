"""Strategies that are Lightning's own, as they are."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

from rlzoo.values import Positive


def auto() -> str:
    """Lightning's choice: one process needs no strategy, several get DDP."""
    return "auto"


def ddp(timeout: Positive = 1800.0) -> DDPStrategy:
    """Every process holds the whole policy; gradients are averaged.

    Args:
        timeout: seconds that a process waits for the others in one exchange.
    """
    return DDPStrategy(timeout=timedelta(seconds=timeout), gradient_as_bucket_view=True)
