"""Optimizer steps: schedules, clipping, and updates that are skipped without a trace in Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning
from torch import nn
from torch.optim import Optimizer

from rlzoo.errors import UserError
from rlzoo.types import OptimizerFactory, PolicyFactory


class OptimizationModule(lightning.LightningModule):
    """A policy with one optimizer. An update with nothing to learn from, or whose gradient is not
    finite, is skipped: weights, Adam's state and the schedule stay as they were.

    Args:
        policy, optimizer, scheduler: factories, see `PolicyAlgorithm`.
        max_skipped_updates: non-finite updates in a row after which the run stops.
    """

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        scheduler: Callable[[Optimizer], Any] | None,
        *,
        max_skipped_updates: int,
    ) -> None:
        super().__init__()
        self.policy_factory, self.optimizer_factory = policy, optimizer
        self.scheduler_factory, self.max_skipped_updates = scheduler, max_skipped_updates
        self.policy: nn.Module | None = None
        self.divisor = 1.0  # of the optimizer step in progress; 0: nothing trains
        self.grad_norms: list[dict[str, float]] = []  # by parameter group, before clipping
        self.skipped: str | None = None  # why the last update was skipped
        self.skips_in_a_row = 0

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = self.policy_factory().train()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory(self.parameter_groups())
        if self.scheduler_factory is None:
            return {"optimizer": optimizer}
        scheduler = {"scheduler": self.scheduler_factory(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, each with its name; a group may set its own `lr`."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        return [{"name": "policy", "params": parameters}]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each parameter group by its norm, or drops all gradients, so that the optimizer
        does nothing."""
        limit, norms = gradient_clip_val or float("inf"), {}
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                norms[group["name"]] = float(nn.utils.clip_grad_norm_(parameters, limit))
        self.skipped = skip_reason(sum(norms.values()), self.divisor)
        if self.skipped:
            optimizer.zero_grad(set_to_none=True)
        else:
            self.grad_norms.append(norms)
        self.trainer.datamodule.ledger.updated(self.skipped)
        self.skips_in_a_row = self.skips_in_a_row + 1 if self.skipped == "non_finite" else 0
        if self.skips_in_a_row > self.max_skipped_updates:
            raise UserError(
                f"{self.skips_in_a_row} updates in a row had a gradient that is not finite"
                f" (algo.max_skipped_updates={self.max_skipped_updates}). The last boundary"
                " checkpoint is kept: resume it with a lower algo.optimizer.lr, or look for a"
                " reward or a log-prob that is not finite in rollouts/."
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self.skipped:
            scheduler.step()


def skip_reason(grad_norm: float, divisor: float) -> str | None:
    """Why an update must not be made: "empty", "non_finite", or None."""
    if divisor == 0:
        return "empty"
    return None if math.isfinite(grad_norm) else "non_finite"
