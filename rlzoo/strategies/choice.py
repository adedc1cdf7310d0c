"""Strategies that are Lightning's own, as they are."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

from rlzoo.values import AtLeast1, Positive


def auto(devices: AtLeast1 = 1, nodes: AtLeast1 = 1) -> DDPStrategy | str:
    """One process needs no strategy, several get DDP.

    Args:
        devices: processes of each machine.
        nodes: machines.
    """
    return "auto" if devices * nodes == 1 else ddp()


def ddp(timeout: Positive = 1800.0) -> DDPStrategy:
    """Every process holds the whole policy; gradients are averaged, and live in their buckets.

    Args:
        timeout: seconds that a process waits for the others in one exchange.
    """
    return DDPStrategy(timeout=timedelta(seconds=timeout), gradient_as_bucket_view=True)
