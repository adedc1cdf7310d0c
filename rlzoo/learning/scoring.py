"""What the trainer's own models say of drawn tokens: log-probs, entropies, values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlzoo.diagnosis.causes import Evidence, Setting, not_finite
from rlzoo.diagnosis.gap import GapWatch
from rlzoo.diagnosis.suspects import suspects
from rlzoo.errors import UserError, check_at_least
from rlzoo.learning.microbatching import Plan, collate
from rlzoo.learning.optimization import OptimizationModule
from rlzoo.models.gather import through
from rlzoo.models.logprobs import response_scores
from rlzoo.models.lora import adapters_off, lora_of
from rlzoo.models.precision import as_trained
from rlzoo.ranks.exchange import all_gather, world
from rlzoo.types import OptimizerFactory, PolicyFactory, RolloutBatch, Rollouts


class ScoringModule(OptimizationModule):
    """A policy, and perhaps a frozen reference, that score rollouts before they are trained on.

    Args:
        policy, optimizer, scheduler, max_skipped_updates: as in `OptimizationModule`.
        needs_reference: whether the initial policy is kept beside the one in training; of one with
            LoRA, it is the same network with its adapters off.
        temperature: of sampling; logits are divided by it in every pass.
        max_tokens_per_microbatch: a larger microbatch is computed in pieces, each recomputed in
            the backward pass, so that memory stays bounded.
        max_logprob_gap: mean |trainer - engine| log-prob, nats, over which the first rollout step
            stops the run; a later one if it is also over 5 times the first one's.
        pad_token_id: fills microbatches.
    """

    extra_scores: tuple[str, ...] = ()  # what a subclass's score_batch adds, by name

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        scheduler: Callable[..., Any] | None,
        *,
        needs_reference: bool,
        temperature: float,
        max_tokens_per_microbatch: int,
        max_logprob_gap: float,
        pad_token_id: int,
        max_skipped_updates: int,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, max_skipped_updates=max_skipped_updates)
        check_at_least("algo.max_tokens_per_microbatch", max_tokens_per_microbatch, 1)
        if not temperature > 0:
            raise UserError(
                f"algo.temperature must be above 0, got {temperature}: training needs a"
                " distribution to take gradients of. Greedy decoding is for evaluation."
            )
        if not max_logprob_gap > 0:
            raise UserError(f"algo.max_logprob_gap must be above 0, got {max_logprob_gap}.")
        self.needs_reference, self.temperature = needs_reference, temperature
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.max_logprob_gap, self.pad_token_id = max_logprob_gap, pad_token_id
        self.gap_watch = GapWatch(max_logprob_gap)
        self.evidence = Evidence()  # of engine and trainer before the first draw; the doctor's
        self.entropy_gradient = False  # True where the loss has an entropy term
        self._reference: list[nn.Module] = []  # in a list: not among the module's parameters

    # --- one microbatch ---------------------------------------------------------------------

    def forward_scores(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """`piece_scores` of a microbatch, in checkpointed pieces if it is too large."""
        return through(self.policy, self.scores_in_pieces, batch)

    def scores_in_pieces(self, batch: RolloutBatch) -> dict[str, Tensor]:
        slices = batch.row_slices(self.max_tokens_per_microbatch)
        if len(slices) == 1:
            return self.piece_scores(batch)
        padded = batch.with_rows(len(slices)).tensors()

        def piece(rows: slice) -> dict[str, Tensor]:
            tensors = {name: tensor[rows] for name, tensor in padded.items()}
            return self.piece_scores(RolloutBatch(tensors, batch.divisor))

        if torch.is_grad_enabled():
            parts = [checkpoint(piece, rows, use_reentrant=False) for rows in slices]
        else:
            parts = [piece(rows) for rows in slices]
        count = len(batch.input_ids)
        return {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}

    def piece_scores(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """`logprobs` and `entropy` of the policy being trained, each [B, T]."""
        scores = response_scores(
            self.policy, batch, self.temperature, entropy_gradient=self.entropy_gradient
        )
        return scores._asdict()

    def agree_on_pieces(self, batches: Sequence[RolloutBatch]) -> None:
        """Gives each microbatch as many pieces as the rank that needs most: where weights are
        sharded, every forward pass is an exchange that all ranks must take part in."""
        needed = [batch.pieces_needed(self.max_tokens_per_microbatch) for batch in batches]
        for batch, counts in zip(batches, zip(*all_gather(needed), strict=True), strict=True):
            batch.pieces = max(counts)

    def score_batch(self, batch: RolloutBatch, old: bool) -> dict[str, Tensor]:
        """What is kept of a scored microbatch, each [B, T] by the name it has in RolloutBatch."""
        kept = {"old_logprobs": self.forward_scores(batch)["logprobs"]} if old else {}
        if self.needs_reference:
            with self.reference_policy() as reference:
                scores = through(reference, response_scores, reference, batch, self.temperature)
            kept["ref_logprobs"] = scores.logprobs
        return kept

    # --- a rollout step ---------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        rollouts: Rollouts,
        indices: Sequence[int],
        old: bool,
        on_progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Fills `rollouts.scores` for some rollouts; every rank scores its share and holds all.

        Where there is nothing to score, a blank microbatch is, so that its names are there.

        Args:
            indices: the rollouts to score.
            old: whether the weights that sampled score too, not the reference alone.
        """
        self.gap_watch.begin(rollouts)
        if not (old or self.needs_reference or self.extra_scores):
            return
        rank, world_size = world()
        limit = self.max_tokens_per_microbatch
        mine: dict[str, dict[int, Tensor]] = {}
        chunks = chunked(rollouts, indices, limit, world_size) or [[]] * world_size
        for chunk in chunks[rank::world_size]:
            plan = Plan(chunk, torch.ones(len(chunk)), 1.0)
            batch = collate(rollouts, plan, self.pad_token_id).to(self.device)
            with self.trainer.precision_plugin.forward_context():  # as in training
                found = self.score_batch(batch, old)
            for name, scores in found.items():
                rows = zip(chunk, scores.cpu(), strict=False)  # an empty chunk has one blank row
                mine.setdefault(name, {}).update(
                    {i: row[: len(rollouts.responses[i])].clone() for i, row in rows}
                )
            on_progress(len(chunk))
        nothing = [torch.zeros(0)] * len(rollouts)
        for part in all_gather(mine):
            for name, found in part.items():
                scores = rollouts.scores.setdefault(name, list(nothing))
                for i, row in found.items():
                    scores[i] = row
        for i, logprobs in mine.get("old_logprobs", {}).items():
            self.note_gap(logprobs, rollouts.sampler_logprobs[i])

    # --- engine against trainer -------------------------------------------------------------

    def note_gap(self, logprobs: Tensor, sampler_logprobs: Tensor) -> None:
        """Adds |trainer - engine| log-probs of the same tokens and weights to the step's."""
        self.gap_watch.note(logprobs, sampler_logprobs)

    def watch_training_pass(self, batch: RolloutBatch) -> None:
        """Notes and checks the gap of a step whose old log-probs come from the training pass.

        That is the gap of its first update; later ones have other weights than the engine had.
        """
        watch = self.gap_watch
        watch.microbatches += 1
        if watch.microbatches <= self.trainer.accumulate_grad_batches:
            mask = batch.response_mask
            self.note_gap(batch.old_logprobs[mask], batch.sampler_logprobs[mask])
        drawn = watch.rollouts is not None and not watch.rollouts.replayed
        lora = lora_of(self.policy)  # whose dropout moves log-probs by itself
        if batch.last and drawn and (lora is None or not lora["dropout"]):
            self.check_gap(watch.rollouts)

    def gap(self) -> dict[str, float]:
        """`rlzoo.diagnosis.causes.gap_figures` of the rollout step so far, over all ranks; collective."""
        return self.gap_watch.figures()

    def check_gap(self, rollouts: Rollouts | None = None) -> None:
        """Stops the run if the engine draws from another policy than the trainer's; collective.

        Args:
            rollouts: of the step, to tell the cause by; without them it is the first step's.

        Raises:
            UserError: `GapWatch.too_far`, on every rank.
        """
        first = rollouts is None or rollouts.rollout_step == 0
        limit = self.gap_watch.too_far(first)
        if limit is None:
            return
        if any(self.gap_watch.odd_anywhere):
            raise UserError(self.not_finite())
        since = "" if first else self.gap_watch.since_the_first()
        raise UserError(
            f"The engine's log-probs differ from the trainer's by {self.gap()['logprob_gap/mean']:.3g}"
            f" nats a token on average (algo.max_logprob_gap={self.max_logprob_gap}): the policy would"
            f" be trained on another model's rollouts.{since} Likely cause:"
            f" {self.cause_of_gap(rollouts)}."
        )

    def cause_of_gap(self, rollouts: Rollouts | None) -> str:
        """`rlzoo.diagnosis.causes.likely_cause`, rank 0's on every rank; collective."""
        flat = torch.cat([torch.zeros(0), *self.gap_watch.gaps])
        gaps, found = list(flat.split(2)), []  # no place in a response is known
        if rollouts is not None:
            old = rollouts.scores.get("old_logprobs", [])
            pairs = zip(old, rollouts.sampler_logprobs, strict=bool(old))
            gaps = [(ours - theirs).abs() for ours, theirs in pairs if len(ours)] or gaps
            found = suspects(
                self.policy,
                rollouts,
                self.temperature,
                self.evidence.setting or Setting(),
                self.trainer.precision_plugin.forward_context,
            )
        return all_gather(self.evidence.cause(gaps, found, self.temperature))[0]

    def not_finite(self) -> str:
        """What to say of log-probs that are no numbers; collective."""
        broken = [name for name, weight in self.named_weights() if not weight.isfinite().all()]
        ours, theirs = self.gap_watch.odd_anywhere
        return not_finite(ours, theirs, broken, self.evidence.setting)

    # --- models -----------------------------------------------------------------------------

    def build_models(self) -> None:
        super().build_models()
        if self.needs_reference and lora_of(self.policy) is None:
            reference = self.policy_factory().eval().requires_grad_(False)
            self._reference = [as_trained(reference, self._trainer)]

    def reference_policy(self) -> AbstractContextManager[nn.Module]:
        """The initial policy, for as long as the context lasts."""
        return nullcontext(self._reference[0]) if self._reference else adapters_off(self.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["first_gap"] = self.gap_watch.first

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.gap_watch.first = checkpoint.get("first_gap")  # older ones have none

    @property
    def side_models(self) -> list[nn.Module]:
        """Frozen models beside the trained ones, for a strategy to shard and to move."""
        return self._reference

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for model in self.side_models:
            model.to(self.device)


def chunked(
    rollouts: Rollouts, indices: Sequence[int], max_tokens: int, parts: int
) -> list[list[int]]:
    """Rollouts of like length together, within a token limit; as many chunks as a multiple of
    `parts`, so some may be empty."""
    chunks: list[list[int]] = []
    width = 0
    for i in sorted(indices, key=lambda i: -rollouts.num_tokens(i)):
        if not chunks or (len(chunks[-1]) + 1) * width > max_tokens:
            chunks.append([])
            width = rollouts.num_tokens(i)
        chunks[-1].append(i)
    return chunks + [[]] * (-len(chunks) % parts)
