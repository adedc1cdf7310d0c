"""Optimizer steps: clipping, and updates that are skipped without a trace in Adam."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any, Protocol

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from rlzoo.errors import UserError
from rlzoo.models.gather import whole
from rlzoo.report.ledger import Ledger

log = logging.getLogger(__name__)

MANY_EMPTY = 10  # updates in a row without anything to learn from after which it is said


class Trained(Protocol):
    """What a strategy that makes the optimizer steps itself asks of the module."""

    @property
    def trainer(self) -> Trainer: ...

    @property
    def frozen_groups(self) -> Collection[str]: ...

    def settle_update(self, norms: dict[str, float]) -> str | None: ...


class UpdateWatch:
    """Says which updates must be skipped. One with nothing to learn from, or whose gradient is not
    finite, leaves weights, Adam's state and the schedule as they were.

    Args:
        max_skipped: non-finite updates in a row after which the run stops.

    Attributes:
        skipped: why the last update was skipped; None if it was made.
        grad_norms: of each update that was made, by parameter group, before clipping.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.skipped: str | None = None
        self.grad_norms: list[dict[str, float]] = []
        self.skips_in_a_row = self.empty_in_a_row = 0
        self.told_of_empty = 0  # of how many in a row was said last

    def settle(self, norms: dict[str, float], divisor: float, ledger: Ledger) -> str | None:
        """Books an update and says why it must be skipped, or None; the same on every rank.

        Args:
            norms: of the averaged gradient before clipping, by parameter group.
            divisor: sum of the update's weights.

        Raises:
            UserError: more than `max_skipped` in a row were not finite.
        """
        self.skipped = skip_reason(sum(norms.values()), divisor)
        if not self.skipped:
            self.grad_norms.append(norms)
        ledger.updated(self.skipped)
        self.count_in_a_row()
        if self.skips_in_a_row > self.max_skipped:
            raise UserError(
                f"{self.skips_in_a_row} updates in a row had a gradient that is not finite"
                f" (algo.max_skipped_updates={self.max_skipped}). The last boundary"
                " checkpoint is kept: resume it with a lower algo.optimizer.lr, or look for a"
                " reward or a log-prob that is not finite in rollouts/."
            )
        return self.skipped

    def count_in_a_row(self) -> None:
        """Counts updates of one kind in a row, and says of empty ones that nothing is learnt."""
        if self.skipped == "empty":
            self.empty_in_a_row += 1
        elif self.skipped == "non_finite":
            self.skips_in_a_row += 1
        else:
            self.skips_in_a_row = self.empty_in_a_row = self.told_of_empty = 0
        if self.empty_in_a_row >= max(MANY_EMPTY, 2 * self.told_of_empty):
            self.told_of_empty = self.empty_in_a_row
            log.warning(
                f"{self.empty_in_a_row} updates in a row had nothing to learn from, so were"
                " skipped: no response was right, or those of each prompt have one reward"
                " (accept_rate and degenerate_groups in metrics.csv, the texts in rollouts/). Give"
                " easier or harder questions, or more responses a prompt. Skipped updates count for"
                " no limits.max_updates, which alone would not end such a run."
            )


def clipped_norms(optimizer: Optimizer, limit: float, frozen: Collection[str]) -> dict[str, float]:
    """Clips each parameter group by its own norm; the norms before, by the group's name.

    Args:
        frozen: names of the groups that the update leaves as they are.
    """
    norms = {}
    for group in optimizer.param_groups:
        if group["name"] in frozen:
            for parameter in group["params"]:
                parameter.grad = None
        parameters = [p for p in group["params"] if p.grad is not None]
        if parameters:
            norms[group["name"]] = float(whole(nn.utils.clip_grad_norm_(parameters, limit)))
    return norms


def check_schedule(scheduler: Any) -> None:
    """Raises a UserError for a schedule that would need a length and has none: it would fail once
    its warm-up is over."""
    settings = getattr(scheduler, "keywords", {})  # of a partial
    for key in ("num_training_steps", "T_max", "total_steps", "total_iters"):
        if key in settings and settings[key] is None:
            raise UserError(
                f"algo.scheduler.{key} is null, but this schedule falls over a number of updates"
                " that it must know. Set limits.max_updates, from which it is taken, or that key"
                " itself; or keep the learning rate with algo.scheduler=null."
            )


def clip_limit(value: float | None, algorithm: object = None) -> float:
    """Largest gradient norm of a parameter group; infinite unless `value` is above 0.

    0, null and, as in many frameworks, negative values turn clipping off: a norm below 0 would
    turn every gradient round.

    Raises:
        UserError: another way of clipping than by norm.
    """
    if algorithm is not None and str(getattr(algorithm, "value", algorithm)) != "norm":
        raise UserError(
            f"trainer.gradient_clip_algorithm={algorithm} would do nothing: gradients are clipped"
            " by the norm of each parameter group. Set it to norm or null."
        )
    return value if value is not None and value > 0 else math.inf


def skip_reason(grad_norm: float, divisor: float) -> str | None:
    """Why an update must not be made: "empty", "non_finite", or None.

    A gradient that is 0 throughout has nothing to learn from either: all advantages are 0, as in
    groups without contrast. Adam's momentum and weight decay would move the weights all the same.

    Args:
        grad_norm: of all parameter groups together, before clipping.
        divisor: sum of the update's weights.
    """
    if divisor == 0 or grad_norm == 0:
        return "empty"
    return None if math.isfinite(grad_norm) else "non_finite"
