"""What every policy-gradient algorithm shares: from scored rollouts to optimizer steps.

A subclass says which rollouts train (`select`), what each is worth (`compute_advantages`) and what
is minimised (`policy_loss`). The base class scores a rollout step with the weights that sampled,
turns it into microbatches, and scales losses so that the gradient of an optimizer step is one
weighted mean over all its tokens, whatever the split into microbatches and ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from rlzoo.algos.options import (
    CLIP_DEFAULTS,
    ClipHigh,
    ClipLow,
    DualClip,
    OverlongBuffer,
    Temperature,
    TISCap,
    check_acting,
    idle_keys,
)
from rlzoo.diagnosis.causes import Evidence
from rlzoo.diagnosis.gap import GapWatch
from rlzoo.learning.losses import (
    KLEstimator,
    LossOutput,
    clipped_surrogate_loss,
    engine_as_old,
    kl_estimate,
    kl_to_reference,
    truncated_importance_weights,
)
from rlzoo.learning.metrics import WeightedMeans
from rlzoo.learning.microbatching import AUTO_TOKENS, Aggregation, microbatch, plan_updates
from rlzoo.learning.optimization import UpdateWatch, check_schedule, clip_limit, clipped_norms
from rlzoo.learning.scoring import declared, score_rollouts
from rlzoo.learning.selection import (
    Selection,
    said_if_single,
    trained_lengths,
    units_of,
    with_the_rest,
)
from rlzoo.learning.shaping import plus_minus_one, soft_overlong_penalty
from rlzoo.models.flops import policy_flops
from rlzoo.models.frozen import FrozenModels
from rlzoo.models.gather import load_whole, through
from rlzoo.models.logprobs import response_scores
from rlzoo.models.lora import is_adapter, lora_of, whole_weights_of
from rlzoo.models.packed import check_placed, is_packed
from rlzoo.models.precision import float_buffers, put_back
from rlzoo.ranks.exchange import all_gather
from rlzoo.report.ledger import Ledger
from rlzoo.rng import derive_seed
from rlzoo.types import Credit, OptimizerFactory, PolicyFactory, RolloutBatch, Rollouts, Update
from rlzoo.values import AtLeast0, AtLeast1, NonNegative, Positive, Seed


class PolicyAlgorithm(lightning.LightningModule):
    """Base of RAFT, RAFT++, GRPO, Reinforce, PPO, Iterative DPO and their kin.

    Args:
        policy: builds the policy; called in `configure_model`, where a strategy can shard it.
        optimizer: builds the optimizer from parameters.
        scheduler: builds a learning-rate schedule from the optimizer, stepped after each update.
        pad_token_id: fills microbatches.

    The rest are keys of every YAML of conf/algo: shared.yaml and clipped.yaml say of each what it
    does, in which unit, and where its value comes from.
    """

    # What an algorithm declares. A score has the name by which a batch holds it: old_logprobs,
    # entropy, NAME_logprobs of a model in `frozen`, or what `policy_scores` or `score_batch` adds.
    scores: tuple[str, ...] = ("old_logprobs",)  # those that loss or credit read
    credit_scores: tuple[str, ...] = ()  # those that `compute_advantages` reads, of all rollouts
    has_ratio = True  # False where the loss has none that could be clipped
    has_dual_clip = True  # False where the loss has no place for one
    uses_reward_values = True  # False where rewards only say which rollouts train
    uses_advantages = True  # False where the loss has none
    splits_kl = False  # True where `compute_advantages` takes the KL from each token's reward
    blames = True  # False where no advantage is below 0
    scale_free = False  # True where twice the rewards give the same advantages
    smallest_group = 1  # responses of a prompt below which they teach nothing

    policy: PreTrainedModel

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        scheduler: Callable[[Optimizer], Any] | None = None,
        *,
        updates: AtLeast1 = 1,
        passes: AtLeast1 = 1,
        aggregation: Aggregation = "token_mean",
        rejected: Literal["drop", "zero"] = "zero",
        reward_scale: Literal["zero_one", "plus_minus_one"] = "zero_one",
        clip_low: ClipLow = 0.2,
        clip_high: ClipHigh = 0.2,
        dual_clip: DualClip = None,
        kl_coef: NonNegative = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_in: Literal["loss", "reward"] = "loss",
        entropy_coef: NonNegative = 0.0,
        old_logprobs: Literal["trainer", "engine"] = "trainer",
        tis_cap: TISCap = None,
        overlong_buffer: OverlongBuffer = 0.0,
        overlong_penalty: NonNegative = 1.0,
        overlong_filter: bool = False,
        temperature: Temperature = 1.0,
        max_response_tokens: AtLeast1 = 128,
        tokens_per_microbatch: AtLeast1 | Literal["auto"] = "auto",
        max_logprob_gap: Positive = 0.1,
        max_skipped_updates: AtLeast0 = 10,
        pad_token_id: int = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        check_schedule(scheduler)
        self.policy_factory, self.optimizer_factory = policy, optimizer
        self.scheduler_factory = scheduler
        self.updates, self.passes = updates, passes
        self.aggregation, self.rejected, self.reward_scale = aggregation, rejected, reward_scale
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.kl_coef, self.kl_estimator, self.kl_in = kl_coef, kl_estimator, kl_in
        self.entropy_coef, self.entropy_gradient = entropy_coef, entropy_coef > 0
        self.old_logprobs, self.tis_cap = old_logprobs, tis_cap
        self.overlong_filter = overlong_filter
        self.overlong_buffer, self.overlong_penalty = overlong_buffer, overlong_penalty
        self.temperature, self.max_response_tokens = temperature, max_response_tokens
        self.tokens_per_microbatch = (
            AUTO_TOKENS if tokens_per_microbatch == "auto" else tokens_per_microbatch
        )
        self.pad_token_id = pad_token_id
        self.max_logprob_gap, self.seed = max_logprob_gap, seed
        # Whether some rollouts do not train; an algorithm with a `select` may know better.
        self.can_reject = overlong_filter or type(self).select is not PolicyAlgorithm.select
        self.check_options()
        if kl_coef > 0:
            self.scores = tuple(dict.fromkeys((*self.scores, "ref_logprobs")))
        self.ledger = Ledger()  # the run's, once it has one
        self.means = WeightedMeans()  # of the rollout step, over tokens
        self.update_watch = UpdateWatch(max_skipped_updates)
        self.gap_watch = GapWatch(max_logprob_gap)
        self.evidence = Evidence()  # of engine and trainer before the first draw; the doctor's
        self.frozen = FrozenModels()  # by name; each gives the score NAME_logprobs
        self.built = False
        self.kept_buffers: dict[str, Tensor] = {}  # as they were before a strategy converted them
        self.restored_weights: Callable[[], dict[str, Tensor]] | None = None  # of a checkpoint
        self.rollout_step = 0
        self.divisor = 1.0  # of the optimizer step in progress; 0: nothing trains
        self.scores_old = True  # whether this rollout step's old log-probs were computed apart
        self.told_of_singles = False
        self.advance: Callable[[int], None] = lambda n: None  # told of each microbatch done

    # --- options ----------------------------------------------------------------------------

    def check_options(self) -> None:
        """Raises a UserError for a value that this algorithm would ignore."""
        check_acting(self, vars(self))

    @classmethod
    def left_out(cls) -> tuple[str, ...]:
        """Arguments that the algorithm has no place for, and no YAML of it may set."""
        return () if cls.has_ratio else tuple(CLIP_DEFAULTS)

    def idle_options(self) -> dict[str, str]:
        """Keys that cannot act as the others stand, with the reason: `rlzoo.launch.idle` refuses
        one that the user set, while a default may stand."""
        return idle_keys(self, vars(self))

    def idle_on_policy(self) -> dict[str, str]:
        """The same for what one update per rollout step makes idle, as a sweep may; said only."""
        if self.updates_per_step > 1:
            return {}
        if "old_logprobs" not in self.scores:
            why = "with one update per rollout step the trainer's old log-probs are its own too"
            return {"algo.old_logprobs": why}
        if not self.has_ratio or self.old_logprobs == "engine":
            return {}
        why = "with one update per rollout step (algo.updates=1, algo.passes=1) the ratio is 1"
        return {f"algo.{key}": why for key in CLIP_DEFAULTS}

    @property
    def shapes_rewards(self) -> bool:
        """Whether anything is taken from the rewards of whole groups that are alike."""
        return self.overlong_buffer > 0 or self.kl_in_reward

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per rollout step."""
        return self.updates * self.passes

    # --- what makes an algorithm that algorithm ---------------------------------------------

    def select(self, rollouts: Rollouts) -> Selection:
        """Which rollouts train, from rewards in [0, 1]: [N] bool, or lists of indices that train
        together; all unless a subclass says so."""
        return torch.ones(len(rollouts), dtype=torch.bool)

    def compute_advantages(self, rollouts: Rollouts) -> Tensor | list[Tensor] | Credit:
        """[N] advantage of each rollout, N x [L] of each token, or Credit with targets beside them.

        From whole groups; rewards come as `shape_rewards` made them, and `rollouts.selected` says
        which train.
        """
        raise NotImplementedError

    def policy_loss(self, logprobs: Tensor, batch: RolloutBatch) -> LossOutput:
        """Weighted sum over a microbatch's tokens; logprobs are [B, T] float32 with gradient.

        PPO's clipped surrogate (arXiv:1707.06347 Eq. 7) unless a subclass says so.
        """
        return clipped_surrogate_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.weights,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )

    def auxiliary_loss(self, scores: dict[str, Tensor], batch: RolloutBatch) -> LossOutput | None:
        """What is minimised beside the policy's loss, from `forward_scores`; PPO's critic."""
        return None

    def score_batch(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """Declared scores that no other place computes, each [B, T] by its name; no gradient."""
        return {}

    # --- models -----------------------------------------------------------------------------

    def build_models(self) -> None:
        """Builds every network, where a strategy can shard it; those in `frozen` are not trained,
        and each gives the score NAME_logprobs."""
        self.noise_seed = torch.initial_seed()
        self.policy = self.policy_factory().train()
        if "ref_logprobs" in self.scores and lora_of(self.policy) is None:
            self.frozen["ref"] = self.policy_factory()

    def configure_model(self) -> None:
        if self.built:
            return
        self.build_models()
        self.built = True
        self.frozen.freeze(self._trainer)
        self.kept_buffers = float_buffers(self)
        if self.restored_weights is not None:
            load_whole(self, self.restored_weights())

    @property
    def side_models(self) -> list[PreTrainedModel]:
        """Frozen models beside the trained ones, for a strategy to shard and to move."""
        return list(self.frozen.values())

    def on_fit_start(self) -> None:
        put_back(self, self.kept_buffers)
        for model in self.side_models:
            model.to(self.device)  # type: ignore[arg-type]  # transformers' wrapper of `to`
        for model in (self.policy, *self.side_models):
            check_placed(model)
        # Ranks may have settled it apart, by the memory of their own machines.
        self.tokens_per_microbatch = min(all_gather(self.tokens_per_microbatch))

    @property
    def pads(self) -> bool:
        """Whether a microbatch's rows are padded to the longest, since they cannot be packed."""
        return not is_packed(self.policy)

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
        checkpoint["first_gap"] = self.gap_watch.first
        if (lora := lora_of(self.policy)) is not None:
            checkpoint["lora"] = lora

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gap_watch.first = checkpoint.get("first_gap")  # older ones have none

    # --- from rollouts to microbatches ------------------------------------------------------

    def training_units(self, rollouts: Rollouts) -> list[list[int]]:
        """The rollouts of a step that are trained on, those that belong together in one list.

        Asks `select` once, and leaves its answer, less truncated rollouts if they are filtered, in
        `rollouts.selected`.
        """
        if self.smallest_group > 1 and not self.told_of_singles:
            self.told_of_singles = said_if_single(rollouts, type(self).__name__)
        truncated = rollouts.truncated if self.overlong_filter else None
        units = units_of(self.select(rollouts), truncated)
        rollouts.selected = torch.zeros(len(rollouts), dtype=torch.bool)
        rollouts.selected[[i for unit in units for i in unit]] = True
        return with_the_rest(units, len(rollouts)) if self.rejected == "zero" else units

    def must_score_old(self, first: bool) -> bool:
        """Whether the weights that sampled score a rollout step before it is trained on.

        With one update per rollout step the ratio is 1 by construction, so old log-probs are taken
        from the training pass; with `old_logprobs=engine` nobody reads them. The first rollout step
        always scores, to compare with the engine.
        """
        if first or self.old_logprobs == "engine":
            return first
        if self.credit_scores or self.kl_in_reward:
            return True
        return "old_logprobs" in self.read_scores and self.updates_per_step > 1

    @property
    def read_scores(self) -> tuple[str, ...]:
        """Names of all scores that something has declared to read."""
        old = () if self.tis_cap is None else ("old_logprobs",)
        return tuple(dict.fromkeys((*self.scores, *self.credit_scores, *old)))

    def score(
        self,
        rollouts: Rollouts,
        units: Sequence[Sequence[int]],
        on_progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Fills `rollouts.scores` with what was declared, of those that train or, where credit
        needs them, of all; compares engine and trainer."""
        self.rollout_step, first = rollouts.rollout_step, rollouts.rollout_step == 0
        indices = [i for unit in units for i in unit]
        if self.credit_scores or self.kl_in_reward or (first and not indices):
            indices = list(range(len(rollouts)))  # the first step is compared whatever trains
        self.scores_old = self.must_score_old(first)
        names = [name for name in self.read_scores if name != "old_logprobs"]
        names = ["old_logprobs", *names] if self.scores_old else names
        self.gap_watch.begin(rollouts)
        if not names:
            return
        scored = score_rollouts(
            rollouts,
            indices,
            lambda batch: self.named_scores(batch.to(self.device), names),
            max_tokens=self.tokens_per_microbatch,
            pad_token_id=self.pad_token_id,
            on_progress=on_progress,
        )
        if self.scores_old:
            old = rollouts.scores["old_logprobs"]
            for i in scored:
                self.gap_watch.note(old[i], rollouts.sampler_logprobs[i])
            if rollouts.comparable:
                self.gap_watch.check(self)

    def credit(self, rollouts: Rollouts) -> Credit:
        """What the rollouts are worth; nothing where they are rejected and stay. `training_units`
        comes first."""
        if self.old_logprobs == "engine":
            scores = rollouts.scores | {"old_logprobs": rollouts.sampler_logprobs}
            rollouts = dataclasses.replace(rollouts, scores=scores)
        assert rollouts.selected is not None, "nobody has asked which rollouts train"
        shaped = dataclasses.replace(rollouts, rewards=self.shape_rewards(rollouts))
        credit = self.compute_advantages(shaped)
        if not isinstance(credit, Credit):
            credit = Credit(credit)
        if self.rejected == "zero":
            pairs = zip(credit.advantages, rollouts.selected, strict=True)
            credit = credit._replace(advantages=[a if keep else 0 * a for a, keep in pairs])
        return credit

    def shape_rewards(self, rollouts: Rollouts) -> Tensor:
        """[N] rewards on `reward_scale`, less the penalties of length and of KL."""
        rewards = rollouts.rewards
        if self.reward_scale == "plus_minus_one":
            rewards = plus_minus_one(rollouts)
        limit = self.max_response_tokens
        buffer = max(1, round(self.overlong_buffer * limit)) if self.overlong_buffer else 0
        penalty = soft_overlong_penalty(rollouts.lengths, limit, buffer)
        rewards = rewards + self.overlong_penalty * penalty
        if self.kl_in_reward and not self.splits_kl:
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

    def plan_updates(
        self,
        rollouts: Rollouts,
        units: Sequence[Sequence[int]],
        credit: Credit,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[Update]:
        """This rank's microbatches of each optimizer step of a rollout step."""
        steps = plan_updates(
            units,
            rollouts.lengths,
            [rollouts.num_tokens(i) for i in range(len(rollouts))],
            rollouts.weights,
            updates=self.updates,
            passes=self.passes,
            budget=self.tokens_per_microbatch,
            padded=self.pads,
            rank=rank,
            world_size=world_size,
            aggregation=self.aggregation,
            max_length=self.max_response_tokens,
            seed=self.seed,
            rollout_step=rollouts.rollout_step,
        )
        read = {name: x for name, x in rollouts.scores.items() if name in self.read_scores}
        kept = dataclasses.replace(rollouts, scores=read)  # what was not declared is not read
        return [
            Update(
                [microbatch(kept, plan, credit, self.pad_token_id) for plan in plans],
                place,
                last=place == len(steps) - 1,
            )
            for place, plans in enumerate(steps)
        ]

    def training_flops(self, rollouts: Rollouts) -> float | None:
        """Operations of a rollout step's updates, over all ranks; None where they are not known."""
        flops = self.pass_flops(*trained_lengths(rollouts, self.rejected == "zero"))
        return None if flops is None else self.passes * flops

    def pass_flops(self, lengths: Tensor, responses: Tensor) -> float | None:
        """The same of one pass over sequences; see `rlzoo.models.flops.policy_flops`."""
        return policy_flops(self.policy, lengths, responses)

    # --- one optimizer step -----------------------------------------------------------------

    def in_training(self) -> AbstractContextManager[None]:
        """The precision of training, for a pass outside of it."""
        return self.trainer.precision_plugin.forward_context()

    def forward_scores(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """`policy_scores` of a microbatch, under any strategy."""
        return through(self.policy, self.policy_scores, batch)

    def policy_scores(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """`logprobs` and `entropy` of the policy being trained, each [B, T]."""
        scores = response_scores(
            self.policy, batch, self.temperature, entropy_gradient=self.entropy_gradient
        )
        return scores._asdict()

    def named_scores(self, batch: RolloutBatch, names: Sequence[str]) -> dict[str, Tensor]:
        """Scores of a microbatch, each [B, T]; a NoSuchScore if nothing computes one of them."""
        with self.in_training():
            own = self.frozen.scores(names, self.policy, batch, self.temperature)
            own |= self.score_batch(batch)
            return declared(names, own, lambda: self.forward_scores(batch))

    def training_step(self, update: Update, batch_idx: int) -> Tensor:
        """The loss of the update's last microbatch, whose backward pass is Lightning's. Those
        before have had theirs, so that memory holds one microbatch's activations."""
        *earlier, last = range(len(update.microbatches))
        for place in earlier:
            self.begin_noise(batch_idx, update.first + place)
            loss = self.microbatch_loss(update, place)
            with torch.autocast(self.device.type, enabled=False):
                self.trainer.strategy.backward(loss, None)
        self.begin_noise(batch_idx, update.first + last)
        return self.microbatch_loss(update, last)

    def microbatch_loss(self, update: Update, place: int) -> Tensor:
        """[] a microbatch's part of the loss whose gradient the update follows."""
        batch = update.microbatches[place].to(self.device)
        scores = self.forward_scores(batch)
        if not self.scores_old:
            as_old = batch.replaced(old_logprobs=scores["logprobs"].detach())
            self.watch_training_pass(as_old, update, place)
            batch = as_old if "old_logprobs" in self.read_scores else batch
        loss = self.total_loss(scores, batch)
        self.means.update(loss.metrics, batch.weights.sum())
        self.divisor = batch.divisor
        self.advance(1)
        return loss.loss_sum * self.loss_scale(batch)

    def begin_noise(self, batch_idx: int, microbatch: int) -> None:
        """Starts dropout's noise anew from where the run is, so that a resume repeats it."""
        if (lora := lora_of(self.policy)) is not None and lora["dropout"] > 0:
            place = self.ledger.updates, batch_idx, microbatch, self.trainer.global_rank
            torch.manual_seed(derive_seed(self.noise_seed, "dropout", *place))

    def watch_training_pass(self, batch: RolloutBatch, update: Update, place: int) -> None:
        """Compares engine and trainer where old log-probs come from the training pass: in the first
        update, since later ones have other weights than the engine had."""
        watch, lora = self.gap_watch, lora_of(self.policy)
        if update.place == 0:
            watch.note(
                batch.old_logprobs[batch.response_mask],
                batch.sampler_logprobs[batch.response_mask],
            )
        ended = update.place == 0 and update.ends and place == len(update.microbatches) - 1
        noisy = lora is not None and lora["dropout"] > 0  # which moves log-probs by itself
        if ended and watch.comparable and not noisy:
            watch.check(self)

    def total_loss(self, scores: dict[str, Tensor], batch: RolloutBatch) -> LossOutput:
        """The policy's loss with what is added to it: KL, entropy, the critic's loss."""
        logprobs, weights = scores["logprobs"], batch.weights
        batch = self.weighed(batch, logprobs.detach())
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

    def weighed(self, batch: RolloutBatch, logprobs: Tensor) -> RolloutBatch:
        """The microbatch as its loss reads it: old log-probs by `old_logprobs`, advantages times
        the weights of `tis_cap` (docs/formulas.md 4.4).

        Args:
            logprobs: [B, T] of the policy being trained, no gradient.
        """
        sampler, mask, cap = batch.sampler_logprobs, batch.response_mask, self.tis_cap
        by_engine = self.old_logprobs == "engine"
        if by_engine and "old_logprobs" in self.scores:
            return batch.replaced(old_logprobs=engine_as_old(logprobs, sampler, mask, cap))
        if cap is None:
            return batch
        old = logprobs if by_engine else batch.old_logprobs
        weights = truncated_importance_weights(old, sampler, mask, cap)
        return batch.replaced(advantages=batch.advantages * weights)

    def loss_scale(self, batch: RolloutBatch) -> float:
        """Factor that makes the step's gradient one weighted mean over all its tokens.

        Ranks are averaged by the strategy, which their number undoes; the divisor, summed over
        microbatches and ranks, then takes the mean once.
        """
        if batch.divisor == 0:
            return 0.0
        return self.trainer.world_size / batch.divisor

    def gap(self) -> dict[str, float]:
        """`rlzoo.diagnosis.causes.gap_figures` of the step so far, over all ranks; collective.
        Under "lag/" where the weights have moved on since it was drawn, which is part of them."""
        rollouts = self.gap_watch.rollouts
        prefix = "lag/" if rollouts is not None and rollouts.lag else ""
        return {f"{prefix}{name}": value for name, value in self.gap_watch.figures().items()}

    # --- optimizer ----------------------------------------------------------------------------

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: Lightning asks when some microbatches have had their backward pass."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Steps and frees the gradients, which no rollout step needs while it is drawn."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer_factory(self.parameter_groups())
        if self.scheduler_factory is None:
            return {"optimizer": optimizer}
        schedule = self.scheduler_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, each with its name; a group may set its own `lr`."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        return [{"name": "policy", "params": parameters}]

    @property
    def frozen_groups(self) -> tuple[str, ...]:
        """Names of the parameter groups that the update in progress leaves as they are."""
        return ()

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
        limit = clip_limit(gradient_clip_val, gradient_clip_algorithm)
        if self.settle_update(clipped_norms(optimizer, limit, self.frozen_groups)):
            optimizer.zero_grad(set_to_none=True)

    def settle_update(self, norms: dict[str, float]) -> str | None:
        """Books an update and says why it must be skipped, or None; see `UpdateWatch`."""
        return self.update_watch.settle(norms, self.divisor, self.ledger)

    @property
    def grad_norms(self) -> list[dict[str, float]]:
        """Of each update that was made, by parameter group, before clipping."""
        return self.update_watch.grad_norms

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self.update_watch.skipped:
            scheduler.step()
