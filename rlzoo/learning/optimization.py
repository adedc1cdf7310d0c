"""Optimizer steps: schedules, clipping, and updates that are skipped without a trace in Adam."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from rlzoo.errors import UserError, check_at_least
from rlzoo.models.checks import check_placed
from rlzoo.models.gather import load_whole, whole
from rlzoo.models.lora import is_adapter, lora_of, whole_weights_of
from rlzoo.models.precision import float_buffers, put_back
from rlzoo.report.ledger import Ledger
from rlzoo.rng import derive_seed
from rlzoo.types import OptimizerFactory, PolicyFactory

log = logging.getLogger(__name__)

MANY_EMPTY = 10  # updates in a row without anything to learn from after which it is said


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
        check_schedule(scheduler)
        check_at_least("algo.max_skipped_updates", max_skipped_updates, 0)
        self.policy_factory, self.optimizer_factory = policy, optimizer
        self.scheduler_factory, self.max_skipped_updates = scheduler, max_skipped_updates
        self.policy: PreTrainedModel | None = None
        self.ledger = Ledger()  # the run's, once it is part of one
        self.kept_buffers: dict[str, Tensor] = {}  # as they were before a strategy converted them
        self.divisor = 1.0  # of the optimizer step in progress; 0: nothing trains
        self.grad_norms: list[dict[str, float]] = []  # by parameter group, before clipping
        self.skipped: str | None = None  # why the last update was skipped
        self.skips_in_a_row = self.empty_in_a_row = 0
        self.told_of_empty = 0  # of how many in a row was said last
        self.restored_weights: Callable[[], dict[str, Tensor]] | None = None  # of a checkpoint

    def configure_model(self) -> None:
        if self.policy is None:
            self.build_models()
            self.kept_buffers = float_buffers(self)
            if self.restored_weights is not None:
                load_whole(self, self.restored_weights())

    def build_models(self) -> None:
        """Builds every network, where a strategy can shard it."""
        self.noise_seed = torch.initial_seed()
        self.policy = self.policy_factory().train()

    def on_fit_start(self) -> None:
        put_back(self, self.kept_buffers)
        check_placed(self.policy)

    @property
    def model_name(self) -> str:
        """What tells one model from another in a checkpoint, adapters left aside."""
        own = (p for name, p in self.policy.named_parameters() if not is_adapter(name))
        count = sum(getattr(p, "ds_numel", p.numel()) for p in own)
        return f"{type(self.policy).__name__} of {count:,} parameters"

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's parameters, whole, by the names that `named_parameters` gives them in a
        model without adapters, which are merged here."""
        return whole_weights_of(self.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (lora := lora_of(self.policy)) is not None:
            checkpoint["lora"] = lora

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Starts dropout's noise anew from where the run is, so that a resume repeats it."""
        if (lora := lora_of(self.policy)) is not None and lora["dropout"] > 0:
            place = self.ledger.updates, batch_idx, self.trainer.global_rank
            torch.manual_seed(derive_seed(self.noise_seed, "dropout", *place))

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
        does nothing. Under DeepSpeed the strategy does that, where the gradients are."""
        if getattr(optimizer, "settles_updates", False):
            return
        limit, norms = clip_limit(gradient_clip_val, gradient_clip_algorithm), {}
        for group in optimizer.param_groups:
            if group["name"] in self.frozen_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                norms[group["name"]] = float(whole(nn.utils.clip_grad_norm_(parameters, limit)))
        if self.settle_update(norms):
            optimizer.zero_grad(set_to_none=True)

    def idle_options(self) -> dict[str, str]:
        """Keys that cannot act, with the reason; setting one is refused (`rlzoo.launch.idle`)."""
        return {}

    def idle_on_policy(self) -> dict[str, str]:
        """Keys that do nothing in this run, with the reason; setting one is said."""
        return {}

    @property
    def frozen_groups(self) -> tuple[str, ...]:
        """Names of the parameter groups that the update in progress leaves as they are."""
        return ()

    def settle_update(self, norms: dict[str, float]) -> str | None:
        """Books an update and says why it must be skipped, or None; the same on every rank.

        Args:
            norms: of the averaged gradient before clipping, by parameter group.

        Raises:
            UserError: more than `max_skipped_updates` in a row were not finite.
        """
        self.skipped = skip_reason(sum(norms.values()), self.divisor)
        if not self.skipped:
            self.grad_norms.append(norms)
        self.ledger.updated(self.skipped)
        self.count_in_a_row()
        if self.skips_in_a_row > self.max_skipped_updates:
            raise UserError(
                f"{self.skips_in_a_row} updates in a row had a gradient that is not finite"
                f" (algo.max_skipped_updates={self.max_skipped_updates}). The last boundary"
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
                f"{self.empty_in_a_row} updates in a row had nothing to learn from, so were skipped:"
                " no response was right, or those of each prompt have one reward (accept_rate and"
                " degenerate_groups in metrics.csv, the texts in rollouts/). Give easier or harder"
                " questions, or more responses a prompt. Skipped updates count for no"
                " limits.max_updates, which alone would not end such a run."
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self.skipped:
            scheduler.step()


def check_schedule(scheduler: Any) -> None:
    """Raises a UserError for a schedule that would need a length and has none: it would fail once
    its warm-up is over."""
    settings = getattr(scheduler, "keywords", {})  # of a partial
    for key in ("num_training_steps", "T_max", "total_steps", "total_iters"):
        if key in settings and settings[key] is None:
            raise UserError(
                f"algo.scheduler.{key} is null, but this schedule falls over a number of updates that"
                " it must know. Set limits.max_updates, from which it is taken, or that key itself;"
                " or keep the learning rate with algo.scheduler=null."
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
            f"trainer.gradient_clip_algorithm={algorithm} would do nothing: gradients are clipped by"
            " the norm of each parameter group. Set it to norm or null."
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
