from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.errors import UserError, check_acts
from rlzoo.learning.losses import LossOutput, dpo_loss
from rlzoo.learning.selection import best_and_worst
from rlzoo.types import OptimizerFactory, PolicyFactory, RolloutBatch, Rollouts
from rlzoo.values import NonNegative, Positive

METRICS = ("dpo/accuracy", "dpo/margin", "dpo/chosen_log_ratio", "dpo/rejected_log_ratio")


class IterativeDPO(PolicyAlgorithm):
    """Iterative Direct Preference Optimization (arXiv:2305.18290, 2312.11456; Online-DPO-R1).

    Trains on one pair per prompt, its best rollout against its worst, and minimises the DPO loss
    on log-probs summed over whole responses. An iteration is a rollout step: the pairs are drawn
    by the weights it starts from. The unit of an optimizer step is the pair, never split.

    iterative_dpo.yaml departs from Online-DPO-R1 in three ways: an iteration is a rollout step,
    there a pass over a data set; the chosen rollout must be correct; and labels are not smoothed
    (there: 0.1).

    Args:
        beta: how strongly the reference holds.
        label_smoothing: chance that a preference is the wrong way round, in [0, 0.5).
        loss: "sigmoid" or "ipo".
        nll_coef: weight of -log pi per token of the chosen response; 0 is none.
        reference: "iteration_start", the weights that drew the pairs, or "initial".
        chosen_must_be_correct: False also pairs a wrong rollout with a worse one, as reference
            code does where rewards have more than two values.
    """

    has_ratio = False
    uses_reward_values = False
    uses_advantages = False
    smallest_group = 2

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        *,
        beta: Positive = 0.1,
        label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0,
        loss: Literal["sigmoid", "ipo"] = "sigmoid",
        nll_coef: NonNegative = 0.0,
        reference: Literal["iteration_start", "initial"] = "iteration_start",
        chosen_must_be_correct: bool = True,
        **shared: Any,
    ) -> None:
        if reference == "initial":
            self.scores = ("old_logprobs", "ref_logprobs")
        super().__init__(policy, optimizer, **shared)
        if self.aggregation != "seq_mean_token_mean":
            raise UserError(
                f"algo=iterative_dpo takes algo.aggregation=seq_mean_token_mean alone, got"
                f" {self.aggregation}: its unit is the pair, and weights that sum to 1 over a"
                " response are how pairs are counted."
            )
        if loss == "ipo":
            why = "algo.loss=ipo has no place for it"
            check_acts("algo.label_smoothing", label_smoothing, 0.0, why)
        why = "what is in no pair is in no denominator either"
        check_acts("algo.rejected", self.rejected, "drop", why)
        self.beta, self.label_smoothing, self.loss_kind = beta, label_smoothing, loss
        self.nll_coef, self.reference = nll_coef, reference
        self.chosen_must_be_correct = chosen_must_be_correct

    def select(self, rollouts: Rollouts) -> list[tuple[int, int]]:
        """(chosen, rejected) of each prompt that has a pair."""
        return best_and_worst(
            rollouts.rewards,
            rollouts.group_ids,
            chosen_must_be_correct=self.chosen_must_be_correct,
        )

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        return torch.zeros(len(rollouts))  # the loss has none

    def policy_loss(self, logprobs: Tensor, batch: RolloutBatch) -> LossOutput:
        """Rows are chosen, rejected, chosen, rejected; a row alone is an empty microbatch."""
        if len(logprobs) == 1:
            nothing = (batch.weights * logprobs).sum()
            return LossOutput(nothing, dict.fromkeys(METRICS, nothing.detach()))
        anchor = batch.ref_logprobs if self.reference == "initial" else batch.old_logprobs
        log_ratios = torch.where(batch.response_mask, logprobs - anchor, 0.0).sum(-1)  # [B]
        chosen, rejected = log_ratios[0::2], log_ratios[1::2]
        losses = dpo_loss(
            chosen,
            rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            kind=self.loss_kind,
        )
        pair_weights = batch.weights.sum(-1).unflatten(0, (-1, 2)).sum(-1)  # [B / 2], 2 each
        loss_sum = (pair_weights * losses).sum()
        if self.nll_coef:
            nll = -(batch.weights[0::2] * logprobs[0::2]).sum()
            loss_sum = loss_sum + 2 * self.nll_coef * nll
        with torch.no_grad():
            sums = [
                (pair_weights * (chosen > rejected)).sum(),
                (pair_weights * self.beta * (chosen - rejected)).sum(),
                (pair_weights * chosen).sum(),
                (pair_weights * rejected).sum(),
            ]
        return LossOutput(loss_sum, dict(zip(METRICS, sums, strict=True)))
