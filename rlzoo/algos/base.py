"""What every policy-gradient algorithm shares: from scored rollouts to optimizer steps.

A subclass says which rollouts train (`select`), what each is worth (`compute_advantages`) and what
is minimised (`policy_loss`). The base class turns a rollout step into microbatches, scores them
with the weights that sampled, and scales losses so that the gradient of an optimizer step is one
weighted mean over all its tokens, whatever the split into microbatches and ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from rlzoo.algos.optimization import OptimizationModule
from rlzoo.errors import UserError, check_at_least, check_choice
from rlzoo.logprobs import TokenScores, response_scores
from rlzoo.losses import LossOutput, kl_to_reference
from rlzoo.metrics import WeightedMeans
from rlzoo.microbatching import AGGREGATIONS, collate, plan_microbatches
from rlzoo.types import OptimizerFactory, PolicyFactory, RolloutBatch, Rollouts


class PolicyAlgorithm(OptimizationModule):
    """Base of RAFT, RAFT++, GRPO, Reinforce and their kin.

    Args:
        policy: builds the policy; called in `configure_model`, where a strategy can shard it.
        optimizer: builds the optimizer from parameters.
        scheduler: builds a learning-rate schedule from the optimizer, stepped after each update.
        updates: optimizer steps per rollout step, of equal numbers of rollouts.
        aggregation: how tokens are averaged, one of `rlzoo.microbatching.AGGREGATIONS`.
        rejected: whether rollouts that `select` turns down leave the denominators ("drop") or
            stay with advantage 0 ("zero", as released code has it).
        reward_scale: "zero_one", or "plus_minus_one" (r -> 2r - 1; arXiv:2504.11343).
        kl_coef: weight of the per-token k3 KL to the initial policy; 0 keeps no reference.
        temperature: of sampling; logits are divided by it in every pass.
        max_response_tokens: limit of a response, the divisor of aggregation "fixed_length".
        max_tokens_per_microbatch: a larger microbatch is computed in pieces, each recomputed in
            the backward pass, so that memory stays bounded.
        max_logprob_gap: mean |old - sampler| log-prob, nats, over which the first rollout step
            stops the run.
        max_skipped_updates: non-finite updates in a row after which the run stops.
        pad_token_id: fills microbatches.
        seed: of the run.
    """

    needs_old_logprobs = True  # False where the loss has no ratio

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        scheduler: Callable[[Optimizer], Any] | None = None,
        *,
        updates: int = 1,
        aggregation: str = "token_mean",
        rejected: str = "zero",
        reward_scale: str = "zero_one",
        kl_coef: float = 0.0,
        temperature: float = 1.0,
        max_response_tokens: int = 128,
        max_tokens_per_microbatch: int = 16384,
        max_logprob_gap: float = 0.1,
        max_skipped_updates: int = 10,
        pad_token_id: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, max_skipped_updates=max_skipped_updates)
        check_choice("algo.aggregation", aggregation, AGGREGATIONS)
        check_choice("algo.rejected", rejected, ("drop", "zero"))
        check_choice("algo.reward_scale", reward_scale, ("zero_one", "plus_minus_one"))
        check_at_least("algo.updates", updates, 1)
        check_at_least("algo.kl_coef", kl_coef, 0)
        check_at_least("algo.max_tokens_per_microbatch", max_tokens_per_microbatch, 1)
        if temperature <= 0:
            raise UserError(
                f"algo.temperature must be above 0, got {temperature}: training needs a"
                " distribution to take gradients of. Greedy decoding is for evaluation."
            )
        self.updates, self.aggregation, self.rejected = updates, aggregation, rejected
        self.reward_scale, self.kl_coef, self.temperature = reward_scale, kl_coef, temperature
        self.max_response_tokens = max_response_tokens
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.max_logprob_gap, self.pad_token_id, self.seed = max_logprob_gap, pad_token_id, seed
        self.means = WeightedMeans()  # of the rollout step, over tokens
        self._gap_sums = [0.0, 0.0, 0.0]  # tokens, sum and largest of the rollout step's gaps
        self.scores_old = True  # whether this rollout step's old log-probs were computed apart
        self._reference: list[nn.Module] = []  # in a list: not among the module's parameters

    # --- what makes an algorithm that algorithm ---------------------------------------------

    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        """[N] advantage of each rollout, from whole groups; rewards are on `reward_scale`."""
        raise NotImplementedError

    def select(self, rollouts: Rollouts) -> Tensor:
        """[N] bool, which rollouts train; all of them unless a subclass says otherwise."""
        return torch.ones(len(rollouts), dtype=torch.bool)

    def policy_loss(self, logprobs: Tensor, batch: RolloutBatch) -> LossOutput:
        """Weighted sum over a microbatch's tokens; logprobs are [B, T] float32 with gradient."""
        raise NotImplementedError

    # --- from rollouts to microbatches ------------------------------------------------------

    def prepare(
        self, rollouts: Rollouts, on_progress: Callable[[int], None] = lambda n: None
    ) -> list[RolloutBatch]:
        """This rank's `updates * accumulate_grad_batches` microbatches of a rollout step."""
        batches = self.plan(
            rollouts,
            accumulate=self.trainer.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        self.score(batches, rollouts.rollout_step == 0, on_progress)
        return batches

    def plan(
        self, rollouts: Rollouts, accumulate: int, rank: int = 0, world_size: int = 1
    ) -> list[RolloutBatch]:
        """Advantages, selection and microbatches, the same on every rank but for what it keeps."""
        if self.reward_scale == "plus_minus_one":
            rollouts = dataclasses.replace(rollouts, rewards=2 * rollouts.rewards - 1)
        advantages = self.compute_advantages(rollouts)
        selected = self.select(rollouts)
        if self.rejected == "zero":
            advantages = torch.where(selected, advantages, 0.0)
            selected = torch.ones_like(selected)
        plans = plan_microbatches(
            rollouts,
            selected.nonzero()[:, 0].tolist(),
            updates=self.updates,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            aggregation=self.aggregation,
            max_length=self.max_response_tokens,
            seed=self.seed,
        )
        batches = [collate(rollouts, plan, advantages, self.pad_token_id) for plan in plans]
        batches[-1].last = True
        return batches

    @torch.no_grad()
    def score(
        self,
        batches: list[RolloutBatch],
        first: bool,
        on_progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Fills `old_logprobs` and `ref_logprobs`, skipping what provably is not needed.

        With one update per rollout step the ratio is 1 by construction, so old log-probs are taken
        from the training pass; the first rollout step always scores, to compare with the engine.
        """
        self._gap_sums = [0.0, 0.0, 0.0]
        ratio_is_one = self.updates == 1 or not self.needs_old_logprobs
        self.scores_old = first or not ratio_is_one
        for batch in batches:
            on_device = batch.to(self.device)
            if self.scores_old:
                batch.old_logprobs = self.response_scores(on_device).logprobs.cpu()
                self.note_gap(batch.old_logprobs, batch)
            if self._reference:
                scores = response_scores(self._reference[0], on_device, self.temperature)
                batch.ref_logprobs = scores.logprobs.cpu()
            on_progress(1)
        if first and self.gap:
            self.check_gap(self.gap["logprob_gap/mean"])

    def note_gap(self, logprobs: Tensor, batch: RolloutBatch) -> None:
        """Adds a microbatch's |trainer - engine| log-probs, of the same weights, to the step's."""
        gap = (logprobs - batch.sampler_logprobs)[batch.response_mask].abs()
        if gap.numel():
            tokens, total, largest = self._gap_sums
            largest = max(largest, float(gap.max()))
            self._gap_sums = [tokens + gap.numel(), total + float(gap.double().sum()), largest]

    @property
    def gap(self) -> dict[str, float]:
        """Sampler against trainer log-probs of the rollout step so far, nats a token."""
        tokens, total, largest = self._gap_sums
        return {"logprob_gap/mean": total / tokens, "logprob_gap/max": largest} if tokens else {}

    def check_gap(self, mean_gap: float) -> None:
        if mean_gap > self.max_logprob_gap:
            raise UserError(
                f"The engine's log-probs differ from the trainer's by {mean_gap:.3g} nats a token"
                f" on average (algo.max_logprob_gap={self.max_logprob_gap}): the policy would be"
                " trained on another model's rollouts. Likely causes: a failed weight sync, another"
                " temperature or top-p in the engine, another dtype, another tokenizer."
            )

    # --- one microbatch ---------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        scores = self.response_scores(batch)
        if not self.scores_old:
            batch.old_logprobs = scores.logprobs.detach()
            if self.updates == 1:  # later updates have other weights than the engine had
                self.note_gap(batch.old_logprobs, batch)
        loss = self.policy_loss(scores.logprobs, batch)
        loss_sum, metrics = loss.loss_sum, dict(loss.metrics)
        if self.kl_coef > 0:
            ref_kl = kl_to_reference(scores.logprobs, batch.ref_logprobs, batch.weights)
            loss_sum = loss_sum + self.kl_coef * ref_kl
            metrics["ref_kl"] = ref_kl.detach()
        metrics["entropy"] = (batch.weights * scores.entropy).sum()
        metrics["loss"] = loss_sum.detach()
        self.means.update(metrics, batch.weights.sum())
        self.divisor = batch.divisor
        return loss_sum * self.loss_scale(batch)

    def loss_scale(self, batch: RolloutBatch) -> float:
        """Factor that makes the step's gradient one weighted mean over all its tokens.

        Ranks are averaged by the strategy and microbatches by Lightning. The two counts undo
        those averages; the divisor, summed over both, then takes the mean once.
        """
        if batch.divisor == 0:
            return 0.0
        return self.trainer.world_size * self.trainer.accumulate_grad_batches / batch.divisor

    def response_scores(self, batch: RolloutBatch) -> TokenScores:
        """[B, T] log-probs and entropies, in checkpointed pieces if the microbatch is too large."""
        slices = batch.row_slices(self.max_tokens_per_microbatch)
        if len(slices) == 1:
            return response_scores(self.policy, batch, self.temperature)

        def piece(rows: slice) -> tuple[Tensor, Tensor]:
            tensors = {name: tensor[rows] for name, tensor in batch.tensors().items()}
            return response_scores(
                self.policy, RolloutBatch(tensors, batch.divisor), self.temperature
            )

        if torch.is_grad_enabled():
            parts = [checkpoint(piece, rows, use_reentrant=False) for rows in slices]
        else:
            parts = [piece(rows) for rows in slices]
        return TokenScores(*(torch.cat(part) for part in zip(*parts, strict=True)))

    # --- models -----------------------------------------------------------------------------

    def configure_model(self) -> None:
        super().configure_model()
        if self.kl_coef > 0 and not self._reference:
            self._reference = [self.policy_factory().eval().requires_grad_(False)]

    def on_fit_start(self) -> None:
        for reference in self._reference:
            reference.to(self.device)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's parameters by the names its own `named_parameters` gives them."""
        return self.policy.named_parameters()
