"""Refuses to go on with weights that are no numbers."""

from __future__ import annotations

from torch import nn

from rlzoo.errors import UserError
from rlzoo.models.finite import broken_weights, not_finite
from rlzoo.ranks.exchange import all_gather


def refuse_broken(policy: nn.Module) -> None:
    """Raises a UserError, on every rank, if weights of the policy are NaN or inf."""
    mine = broken_weights(policy.named_parameters())
    found = sorted({name for names in all_gather(mine) for name in names})
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        dtype = str(next(policy.parameters()).dtype).removeprefix("torch.")
        raise UserError(
            f"The policy's weights are not finite: {', '.join(found[:3])}{more} hold NaN or inf"
            f" (in {dtype}), so there is nothing left to draw from. If they were so at the start,"
            " give other weights by model.path or init_from; if training made them so, resume the"
            " last checkpoint with model.dtype=float32, a lower algo.optimizer.lr or"
            " trainer.gradient_clip_val."
        )


def refuse_broken_update(module: nn.Module, updates: int) -> None:
    """Raises a UserError if a parameter holds NaN or inf, before it is saved or sampled from."""
    broken = [name for name in all_gather(not_finite(module.named_parameters())) if name]
    if broken:
        raise UserError(
            f"After update {updates} {broken[0]} holds NaN or inf, so there is no policy any more."
            " What was saved before stands: go on from it with a lower lr, or with wider numbers:"
            " model.dtype=float32."
        )
