"""The gap between engine and trainer of a rollout step, over all ranks, and when it stops a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlzoo.diagnosis.causes import Setting, gap_figures, not_finite
from rlzoo.diagnosis.probe import Trainee
from rlzoo.diagnosis.suspects import sample_of, suspects
from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather
from rlzoo.types import Rollouts

LATER = 5.0  # times the first step's gap that a later one may have, where that is over the limit


class GapWatch:
    """|trainer - engine| log-probs of the same tokens and weights.

    Args:
        limit: `algo.max_logprob_gap`, mean nats a token.

    Attributes:
        first: mean gap of the run's first rollout step, nats; None before it.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.first: float | None = None
        self.begin()

    def begin(self, rollouts: Rollouts | None = None) -> None:
        """Forgets the rollout step before; `rollouts` are those of the one that begins."""
        self.rollouts = rollouts
        self.gaps: list[Tensor] = []  # [tokens] each, nats, of this rank
        self.odd = [0, 0]  # log-probs that are not finite, of the trainer and of the engine
        self.odd_anywhere = [0, 0]  # the same over all ranks, once `figures` has been called
        self._figures: dict[str, float] | None = None

    def note(self, logprobs: Tensor, sampler_logprobs: Tensor) -> None:
        """Adds some tokens' log-probs, trainer's and engine's."""
        for i, mine in enumerate((logprobs, sampler_logprobs)):
            self.odd[i] += int((~mine.isfinite()).sum())
        self.gaps.append((logprobs - sampler_logprobs).abs().float().cpu())
        self._figures = None

    @property
    def comparable(self) -> bool:
        """Whether an engine of this run drew the rollout step with the weights that it trains, so
        that its gap can be checked."""
        return self.rollouts is not None and self.rollouts.comparable

    def figures(self) -> dict[str, float]:
        """`gap_figures` of the rollout step so far, over all ranks; collective if tokens were
        noted since the last call, which must be so on all ranks or none."""
        if self._figures is None:
            parts = all_gather((self.gaps, self.odd))
            self.odd_anywhere = [sum(odd[i] for _, odd in parts) for i in range(2)]
            noted = [gaps for part, _ in parts for gaps in part]
            self._figures = gap_figures(torch.cat(noted)) if noted else {}
        return self._figures

    def too_far(self, first: bool) -> float | None:
        """The limit that the step's mean gap is over, nats, or None; collective as `figures`.

        Args:
            first: whether this is the run's first rollout step. A later one may have as much as
                LATER times the gap of the first, or any where that is not known (after a resume of
                an older checkpoint), and is then what later ones are measured by. A gap that is no
                number is over any limit at first, and later if the engine's log-probs are the
                cause: what the trainer's own do to an update, `max_skipped_updates` sees to.
        """
        figures = self.figures()
        mean = figures.get("logprob_gap/mean")
        if mean is None:
            return None
        known = math.inf if self.first is None else LATER * self.first
        limit = self.limit if first else max(self.limit, known)
        ours, theirs = self.odd_anywhere
        broken = ours + theirs > 0 if first else theirs > ours
        if broken or (not mean <= limit and not (math.isnan(mean) and not first)):
            return limit
        if self.first is None and not math.isnan(mean):
            self.first = mean
        return None

    def check(self, module: Trainee) -> None:
        """Stops the run if the engine draws from another policy than the trainer's; collective.

        Raises:
            UserError: `too_far`, on every rank.
        """
        rollouts = self.rollouts
        first = rollouts is None or rollouts.rollout_step == 0
        if self.too_far(first) is None:
            return
        if any(self.odd_anywhere):
            (ours, theirs), weights = self.odd_anywhere, module.named_weights()
            broken = [name for name, weight in weights if not weight.isfinite().all()]
            raise UserError(not_finite(ours, theirs, broken, module.evidence.setting))
        since = "" if first else self.since_the_first()
        raise UserError(
            f"The engine's log-probs differ from the trainer's by"
            f" {self.figures()['logprob_gap/mean']:.3g} nats a token on average"
            f" (algo.max_logprob_gap={self.limit}): the policy would be trained on another model's"
            f" rollouts.{since} Likely cause: {self.cause(module)}."
        )

    def cause(self, module: Trainee) -> str:
        """`rlzoo.diagnosis.causes.Evidence.cause`, rank 0's on every rank; collective."""
        flat = torch.cat([torch.zeros(0), *self.gaps])
        gaps, found = list(torch.split(flat, 2)), []  # no place in a response is known
        if self.rollouts is not None:
            old = self.rollouts.scores.get("old_logprobs", [])
            pairs = zip(old, self.rollouts.sampler_logprobs, strict=bool(old))
            gaps = [(ours - theirs).abs() for ours, theirs in pairs if len(ours)] or gaps
            found = suspects(
                module.policy,
                sample_of(self.rollouts),
                module.temperature,
                module.evidence.setting or Setting(),
                module.in_training,
            )
        causes: list[str] = all_gather(module.evidence.cause(gaps, found, module.temperature))
        return causes[0]

    def since_the_first(self) -> str:
        return (
            f" In the first rollout step it was {self.first:.2g}: what has changed since is the"
            " weights, so look at the weight sync and, on a GPU, at the engine's sleep"
            " (engine.sleep_level)."
            if self.first is not None
            else ""
        )
