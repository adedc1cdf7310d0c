"""What every policy-gradient algorithm shares: from scored rollouts to optimizer steps.

A subclass says which rollouts train (`select`), what each is worth (`compute_advantages`) and what
is minimised (`policy_loss`). The base class scores a rollout step with the weights that sampled,
turns it into microbatches, and scales losses so that the gradient of an optimizer step is one
weighted mean over all its tokens, whatever the split into microbatches and ranks.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlzoo.errors import UserError, check_acts, check_at_least, check_choice
from rlzoo.learning.length import soft_overlong_penalty
from rlzoo.learning.losses import (
    KL_ESTIMATORS,
    LossOutput,
    kl_estimate,
    kl_to_reference,
    truncated_importance_weights,
)
from rlzoo.learning.metrics import WeightedMeans
from rlzoo.learning.microbatching import AGGREGATIONS, collate, plan_microbatches
from rlzoo.learning.scoring import ScoringModule
from rlzoo.types import OptimizerFactory, PolicyFactory, RolloutBatch, Rollouts
from rlzoo.values import AtLeast0, AtLeast1, Positive, Seed

log = logging.getLogger(__name__)


class PolicyAlgorithm(ScoringModule):
    """Base of RAFT, RAFT++, GRPO, Reinforce, PPO, Iterative DPO and their kin.

    Args:
        policy: builds the policy; called in `configure_model`, where a strategy can shard it.
        optimizer: builds the optimizer from parameters.
        scheduler: builds a learning-rate schedule from the optimizer, stepped after each update.
        updates: optimizer steps per pass over a rollout step, of equal numbers of rollouts.
        passes: times that a rollout step is trained on.
        aggregation: how tokens are averaged, one of `rlzoo.learning.microbatching.AGGREGATIONS`.
        rejected: whether rollouts that `select` turns down leave the denominators ("drop") or
            stay with advantage 0 ("zero", as released code has it).
        reward_scale: "zero_one", or "plus_minus_one" (r -> 2r - 1; arXiv:2504.11343).
        kl_coef: weight of the per-token KL to the initial policy; 0 keeps no reference.
        kl_estimator: "k1", "k2" or "k3", see `rlzoo.learning.losses.kl_estimate`.
        kl_in: "loss" adds the KL to the loss, "reward" takes it from the reward.
        entropy_coef: weight of the policy's entropy, which is added to the objective.
        tis_cap: bound of the importance weight of trainer against engine log-probs (truncated
            importance sampling); null trains without.
        overlong_buffer: last share of the length limit, in [0, 1), over which a penalty grows from
            0 to `overlong_penalty` (DAPO, arXiv:2503.14476 Eq. 13); 0 is none, else a token at least.
        overlong_filter: whether truncated rollouts are rejected.
        max_response_tokens: limit of a response, the divisor of aggregation "fixed_length".
        seed: of the run.
        temperature, max_tokens_per_microbatch, max_logprob_gap, pad_token_id,
            max_skipped_updates: see `ScoringModule`.
    """

    needs_old_logprobs = True  # False where the loss has no ratio
    needs_reference_always = False  # True where the loss has a reference whatever kl_coef is
    credits_tokens = False  # True where advantages come from per-token scores
    uses_reward_values = True  # False where rewards only say which rollouts train
    uses_advantages = True  # False where the loss has none
    smallest_group = 1  # responses of a prompt below which they teach nothing

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        scheduler: Callable[[Optimizer], Any] | None = None,
        *,
        updates: AtLeast1 = 1,
        passes: AtLeast1 = 1,
        aggregation: str = "token_mean",
        rejected: str = "zero",
        reward_scale: str = "zero_one",
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        kl_in: str = "loss",
        entropy_coef: float = 0.0,
        tis_cap: float | None = None,
        overlong_buffer: float = 0.0,
        overlong_penalty: float = 1.0,
        overlong_filter: bool = False,
        temperature: float = 1.0,
        max_response_tokens: AtLeast1 = 128,
        max_tokens_per_microbatch: AtLeast1 = 16384,
        max_logprob_gap: Positive = 0.1,
        max_skipped_updates: AtLeast0 = 10,
        pad_token_id: int = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            policy,
            optimizer,
            scheduler,
            needs_reference=kl_coef > 0 or self.needs_reference_always,
            temperature=temperature,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            max_logprob_gap=max_logprob_gap,
            pad_token_id=pad_token_id,
            max_skipped_updates=max_skipped_updates,
        )
        self.updates, self.passes = updates, passes
        self.aggregation, self.rejected, self.reward_scale = aggregation, rejected, reward_scale
        self.kl_coef, self.kl_estimator, self.kl_in = kl_coef, kl_estimator, kl_in
        self.entropy_coef, self.entropy_gradient = entropy_coef, entropy_coef > 0
        self.tis_cap, self.overlong_filter = tis_cap, overlong_filter
        self.overlong_buffer, self.overlong_penalty = overlong_buffer, overlong_penalty
        self.max_response_tokens, self.seed = max_response_tokens, seed
        self.means = WeightedMeans()  # of the rollout step, over tokens
        self.told_of_singles = False
        self.scores_old = True  # whether this rollout step's old log-probs were computed apart
        self.check_options()

    def check_options(self) -> None:
        """Raises a UserError for a value out of range, or one that this algorithm would ignore."""
        check_choice("algo.aggregation", self.aggregation, AGGREGATIONS)
        check_choice("algo.rejected", self.rejected, ("drop", "zero"))
        check_choice("algo.reward_scale", self.reward_scale, ("zero_one", "plus_minus_one"))
        check_choice("algo.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("algo.kl_in", self.kl_in, ("loss", "reward"))
        for key in ("updates", "passes", "max_response_tokens"):
            check_at_least(f"algo.{key}", getattr(self, key), 1)
        for key in ("kl_coef", "entropy_coef", "overlong_penalty"):
            check_at_least(f"algo.{key}", getattr(self, key), 0)
        if self.tis_cap is not None:
            check_at_least("algo.tis_cap", self.tis_cap, 1)
        if not 0 <= self.overlong_buffer < 1:
            raise UserError(
                f"algo.overlong_buffer must be in [0, 1), got {self.overlong_buffer}: it is a share"
                " of the length limit. DAPO uses 0.2."
            )
        if not self.uses_reward_values and (self.overlong_buffer or self.kl_in_reward):
            raise UserError(
                f"{type(self).__name__} asks of rewards only which rollouts are right, so"
                " algo.overlong_buffer and algo.kl_in=reward would do nothing. Use"
                " algo.overlong_filter and algo.kl_in=loss."
            )
        self.check_idle()
        if self.kl_coef and self.kl_in == "loss" and self.kl_estimator == "k1":
            log.warning(
                "algo.kl_estimator=k1 in the loss has a mean gradient of 0: prefer k2 or k3."
            )

    def check_idle(self) -> None:
        """Raises a UserError for a value that was asked for and could not act."""
        name = type(self).__name__
        if self.kl_coef == 0:
            why = "algo.kl_coef=0 leaves the KL out"
            check_acts("algo.kl_estimator", self.kl_estimator, "k3", why)
            check_acts("algo.kl_in", self.kl_in, "loss", why)
        if not self.uses_reward_values:
            why = f"{name} asks of rewards only which rollouts are right"
            check_acts("algo.reward_scale", self.reward_scale, "zero_one", why)
        if not self.uses_advantages:
            why = f"the loss of {name} has no advantages that it could weigh"
            check_acts("algo.tis_cap", self.tis_cap, None, why)
        if self.overlong_buffer == 0:
            why = "algo.overlong_buffer=0 leaves the penalty out"
            check_acts("algo.overlong_penalty", self.overlong_penalty, 1.0, why)
        elif self.overlong_penalty == 0:
            why = "algo.overlong_penalty=0 is no penalty"
            check_acts("algo.overlong_buffer", self.overlong_buffer, 0.0, why)

    def idle_options(self) -> dict[str, str]:
        """Keys that cannot act as the others stand, with the reason: `rlzoo.launch.idle` refuses one
        that the user set, while a default may stand."""
        idle = {}
        if not self.can_reject:
            idle["algo.rejected"] = f"this {type(self).__name__} turns no rollout down"
        if not self.overlong_buffer and self.aggregation != "fixed_length":
            why = "responses are drawn up to datamodule.max_response_tokens"
            idle["algo.max_response_tokens"] = why
        if self.scale_free and not self.shapes_rewards:
            idle["algo.reward_scale"] = "advantages are standardised, whatever the rewards' scale"
        return idle

    def idle_on_policy(self) -> dict[str, str]:
        """The same for what one update per rollout step makes idle, as a sweep may; said only."""
        return {}

    @property
    def can_reject(self) -> bool:
        """Whether there are rollouts that do not train."""
        return self.overlong_filter or type(self).select is not PolicyAlgorithm.select

    @property
    def scale_free(self) -> bool:
        """Whether twice the rewards give the same advantages."""
        return False

    @property
    def shapes_rewards(self) -> bool:
        """Whether anything is taken from the rewards of whole groups that are alike."""
        return self.overlong_buffer > 0 or self.kl_in_reward

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    # --- what makes an algorithm that algorithm ---------------------------------------------

    def compute_advantages(self, rollouts: Rollouts) -> Tensor | list[Tensor]:
        """[N] advantage of each rollout, or N x [L] of each token, from whole groups.

        Rewards come as `shape_rewards` made them.
        """
        raise NotImplementedError

    def select(self, rollouts: Rollouts) -> Tensor:
        """[N] bool, which rollouts train, from rewards in [0, 1]; all unless a subclass says so."""
        return torch.ones(len(rollouts), dtype=torch.bool)

    def policy_loss(self, logprobs: Tensor, batch: RolloutBatch) -> LossOutput:
        """Weighted sum over a microbatch's tokens; logprobs are [B, T] float32 with gradient."""
        raise NotImplementedError

    def auxiliary_loss(self, scores: dict[str, Tensor], batch: RolloutBatch) -> LossOutput | None:
        """What is minimised beside the policy's loss, from `forward_scores`; PPO's critic."""
        return None

    # --- from rollouts to microbatches ------------------------------------------------------

    def prepare(
        self, rollouts: Rollouts, on_progress: Callable[[int], None] = lambda n: None
    ) -> list[RolloutBatch]:
        """This rank's `microbatches_per_step` microbatches of a rollout step, scored."""
        self.say_if_single(rollouts)
        first = rollouts.rollout_step == 0
        self.scores_old = self.must_score_old(first)
        scored = self.scored(rollouts)
        if first and not scored:  # nothing trains, but engine and trainer are compared all the same
            scored = list(range(len(rollouts)))
        self.score(rollouts, scored, self.scores_old, on_progress)
        if self.scores_old and not rollouts.replayed:
            self.check_gap(rollouts)
        batches = self.plan(
            rollouts,
            accumulate=self.trainer.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        self.agree_on_pieces(batches)
        return batches

    def say_if_single(self, rollouts: Rollouts) -> None:
        """Says once that there are groups too small to teach; `single_groups` counts them."""
        single = int((rollouts.group_ids.bincount() == 1).sum()) if len(rollouts) else 0
        if single and self.smallest_group > 1 and not self.told_of_singles:
            self.told_of_singles = True
            log.warning(
                f"{single} of {len(rollouts.prompts)} prompts have one response in this rollout step:"
                f" {type(self).__name__}, which compares responses, learns nothing of them (column"
                " single_groups; sampler.allocator.n_min=2 gives every prompt two)."
            )

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per rollout step."""
        return self.updates * self.passes

    def must_score_old(self, first: bool) -> bool:
        """Whether the weights that sampled score a rollout step before it is trained on.

        With one update per rollout step the ratio is 1 by construction, so old log-probs are taken
        from the training pass; the first rollout step always scores, to compare with the engine.
        """
        if first or self.credits_tokens or self.kl_in_reward:
            return True
        needed = self.needs_old_logprobs or self.tis_cap is not None
        return needed and self.updates_per_step > 1

    def scored(self, rollouts: Rollouts) -> list[int]:
        """Rollouts that are scored: those that train, or all where credit needs them."""
        if self.credits_tokens or self.kl_in_reward:
            return list(range(len(rollouts)))
        return [i for unit in self.units(rollouts) for i in unit]

    def units(self, rollouts: Rollouts) -> Sequence[Sequence[int]]:
        """The rollouts that train, those that belong together in one list."""
        if self.rejected == "zero":
            return [[i] for i in range(len(rollouts))]
        return [[i] for i in self.selected(rollouts).nonzero()[:, 0].tolist()]

    def selected(self, rollouts: Rollouts) -> Tensor:
        """[N] bool: `select`, less truncated rollouts if they are filtered."""
        kept = self.select(rollouts)
        return kept & ~rollouts.truncated if self.overlong_filter else kept

    def plan(
        self, rollouts: Rollouts, accumulate: int, rank: int = 0, world_size: int = 1
    ) -> list[RolloutBatch]:
        """Advantages, selection and microbatches, the same on every rank but for what it keeps."""
        shaped = dataclasses.replace(rollouts, rewards=self.shape_rewards(rollouts))
        advantages = self.compute_advantages(shaped)
        if self.rejected == "zero":
            kept = self.selected(rollouts)
            advantages = [a if keep else 0 * a for a, keep in zip(advantages, kept, strict=True)]
        plans = plan_microbatches(
            rollouts,
            self.units(rollouts),
            updates=self.updates,
            passes=self.passes,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            aggregation=self.aggregation,
            max_length=self.max_response_tokens,
            seed=self.seed,
        )
        batches = [collate(rollouts, plan, self.pad_token_id, advantages) for plan in plans]
        batches[-1].last = True
        return batches

    def shape_rewards(self, rollouts: Rollouts) -> Tensor:
        """[N] rewards on `reward_scale`, less the penalties of length and of KL."""
        rewards = rollouts.rewards
        if self.reward_scale == "plus_minus_one":
            check_zero_one(rollouts)
            rewards = 2 * rewards - 1
        limit = self.max_response_tokens
        buffer = max(1, round(self.overlong_buffer * limit)) if self.overlong_buffer else 0
        penalty = soft_overlong_penalty(rollouts.lengths, limit, buffer)
        rewards = rewards + self.overlong_penalty * penalty
        if self.kl_in_reward and not self.credits_tokens:
            sums = [kl.sum() for kl in self.kl_penalties(rollouts)]
            rewards = rewards - torch.stack(sums) if sums else rewards
        return rewards

    def kl_penalties(self, rollouts: Rollouts) -> list[Tensor]:
        """N x [L]: what each token's reward loses, `kl_coef` times the KL at sampling time."""
        old, ref = rollouts.scores["old_logprobs"], rollouts.scores["ref_logprobs"]
        return [
            self.kl_coef * kl_estimate(o, r, self.kl_estimator)
            for o, r in zip(old, ref, strict=True)
        ]

    # --- one microbatch ---------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        scores = self.forward_scores(batch)
        if not self.scores_old:
            batch.old_logprobs = scores["logprobs"].detach()
            self.watch_training_pass(batch)
        loss = self.total_loss(scores, batch)
        self.means.update(loss.metrics, batch.weights.sum())
        self.divisor = batch.divisor
        return loss.loss_sum * self.loss_scale(batch)

    def total_loss(self, scores: dict[str, Tensor], batch: RolloutBatch) -> LossOutput:
        """The policy's loss with what is added to it: KL, entropy, the critic's loss."""
        logprobs, weights = scores["logprobs"], batch.weights
        if self.tis_cap is not None:
            tis = truncated_importance_weights(
                batch.old_logprobs, batch.sampler_logprobs, batch.response_mask, self.tis_cap
            )
            batch = batch.replaced(advantages=batch.advantages * tis)
        loss_sum, metrics = self.policy_loss(logprobs, batch)
        metrics = dict(metrics)
        if self.kl_coef > 0:
            ref_kl = kl_to_reference(logprobs, batch.ref_logprobs, weights, self.kl_estimator)
            if self.kl_in == "loss":
                loss_sum = loss_sum + self.kl_coef * ref_kl
            metrics["ref_kl"] = ref_kl.detach()
        entropy = (weights * scores["entropy"]).sum()
        if self.entropy_coef > 0:
            loss_sum = loss_sum - self.entropy_coef * entropy
        metrics["entropy"] = entropy.detach()
        if (auxiliary := self.auxiliary_loss(scores, batch)) is not None:
            loss_sum, metrics = loss_sum + auxiliary.loss_sum, metrics | auxiliary.metrics
        metrics["loss"] = loss_sum.detach()
        return LossOutput(loss_sum, metrics)

    def loss_scale(self, batch: RolloutBatch) -> float:
        """Factor that makes the step's gradient one weighted mean over all its tokens.

        Ranks are averaged by the strategy and microbatches by Lightning. The two counts undo
        those averages; the divisor, summed over both, then takes the mean once.
        """
        if batch.divisor == 0:
            return 0.0
        return self.trainer.world_size * self.trainer.accumulate_grad_batches / batch.divisor


def check_zero_one(rollouts: Rollouts) -> None:
    """Raises a UserError for a reward outside [0, 1], which would not land on [-1, 1]."""
    inside = (rollouts.rewards >= 0) & (rollouts.rewards <= 1)
    for i in (~inside).nonzero()[:1, 0].tolist():
        prompt = rollouts.prompts[int(rollouts.group_ids[i])]
        raise UserError(
            f"algo.reward_scale=plus_minus_one takes rewards from [0, 1] to [-1, 1], but prompt"
            f" {prompt.id} has one of {float(rollouts.rewards[i]):g}. Set"
            " algo.reward_scale=zero_one, which leaves rewards as they are."
        )
