"""GVM's budgets: Proposition 1 of arXiv:2505.02391."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from rlzoo.allocators.base import Allocator, round_to_total
from rlzoo.errors import UserError
from rlzoo.rewards.base import is_right
from rlzoo.values import AtLeast0, AtLeast1, Positive, Says


def gvm_weights(
    accept_rates: np.ndarray, grad_norms: np.ndarray, alpha: float, beta: float
) -> np.ndarray:
    """w_i = G_i / sqrt(p_i + alpha / p_i^(beta - 1)), 0 where p_i or G_i is 0 (Proposition 1).

    Args:
        accept_rates: [P] p_i in [0, 1], share of pilots that were correct.
        grad_norms: [P] G_i >= 0, mean gradient norm of correct pilots.
        alpha, beta: damp prompts that are nearly hopeless.
    """
    p = np.where(accept_rates > 0, accept_rates, 1.0)
    weights = grad_norms / np.sqrt(p + alpha / p ** (beta - 1))
    return np.where(accept_rates > 0, weights, 0.0)


class GVMBudgets(Allocator):
    """Gives more responses to prompts whose gradient is large or hard to come by.

    A prompt none of whose pilots was correct gets `n_min` responses: 0 drops it for the epoch, as
    the paper does (`unsolved = drop`); a floor lets it come back.

    Args:
        alpha, beta: of Proposition 1; the paper has 1e-3 and 2.
        n_min, n_max: bounds of a prompt's budget; the paper has none.
    """

    def __init__(
        self,
        alpha: Positive = 1e-3,
        beta: Annotated[float, Ge(2), Says("See arXiv:2505.02391 Eq. 7")] = 2.0,
        n_min: AtLeast0 = 0,
        n_max: AtLeast1 | None = None,
    ) -> None:
        if n_max is not None and n_max < n_min:
            raise UserError(
                f"sampler.allocator.n_max must be null or at least n_min={n_min}, got {n_max}."
            )
        self.alpha, self.beta, self.n_min, self.n_max = alpha, beta, n_min, n_max
        self.accept_rates: dict[str, float] = {}
        self.grad_norms: dict[str, float] = {}

    def observe(
        self,
        prompt_ids: Sequence[str],
        rewards: Sequence[Sequence[float]],
        grad_norms: Sequence[float] | None = None,
    ) -> None:
        """Keeps the latest round of pilots alone: older ones are of another policy."""
        self.accept_rates = {
            prompt_id: float(np.mean(is_right(np.asarray(reward))))
            for prompt_id, reward in zip(prompt_ids, rewards, strict=True)
        }
        assert grad_norms is not None, "GVM plans by gradient norms"
        self.grad_norms = dict(zip(prompt_ids, map(float, grad_norms), strict=True))

    def bounds(self, prompts: int, total: int) -> tuple[int, int]:
        """As in Allocator; asked at start-up, before any pilot is paid."""
        if self.n_max is not None and self.n_max * prompts < total:
            raise UserError(
                f"sampler.allocator.n_max={self.n_max} is too small: {prompts} prompts have to"
                f" share {total} responses. Raise it, or lower datamodule.responses_per_prompt."
            )
        if self.n_min * prompts > total:
            raise UserError(
                f"sampler.allocator.n_min={self.n_min} is too large: {prompts} prompts have only"
                f" {total} responses to share. Lower it, or raise datamodule.responses_per_prompt."
            )
        most = total - self.n_min * (prompts - 1)
        return self.n_min, most if self.n_max is None else min(most, self.n_max)

    def allocate(self, prompt_ids: Sequence[str], total: int) -> list[int]:
        self.bounds(len(prompt_ids), total)
        rates = np.array([self.accept_rates[i] for i in prompt_ids])
        return self.budgets(rates, np.array([self.grad_norms[i] for i in prompt_ids]), total)

    def budgets(self, accept_rates: np.ndarray, grad_norms: np.ndarray, total: int) -> list[int]:
        """In proportion to `gvm_weights`, exact in sum; uniform if no weight is positive.

        Args:
            accept_rates, grad_norms: [P], see `gvm_weights`.
            total: responses to share out.

        Raises:
            UserError: rates or norms that are not finite, of which no budget follows.
        """
        broken = ~(np.isfinite(accept_rates) & np.isfinite(grad_norms))
        if broken.any():
            raise UserError(
                f"sampler=gvm cannot share out responses: of {broken.sum()} of {len(broken)}"
                " prompts the pilots' acceptance rate or gradient norm is not finite. The policy's"
                " numbers outgrow their format: take model.dtype=float32 or bfloat16, or"
                " trainer.precision=32-true or bf16-mixed; sampler=uniform asks for no norms."
            )
        weights = gvm_weights(accept_rates, grad_norms, self.alpha, self.beta)
        if weights.sum() == 0:
            weights = np.ones_like(weights)
        return round_to_total(weights / weights.sum(), total, low=self.n_min, high=self.n_max)

    def state_dict(self) -> dict[str, Any]:
        return {"accept_rates": dict(self.accept_rates), "grad_norms": dict(self.grad_norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accept_rates, self.grad_norms = state["accept_rates"], state["grad_norms"]
