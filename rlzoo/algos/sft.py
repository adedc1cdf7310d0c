from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.learning.losses import LossOutput
from rlzoo.ranks.exchange import all_gather
from rlzoo.types import OptimizerFactory, PolicyFactory, RolloutBatch
from rlzoo.values import AtLeast0, AtLeast1


class SFT(PolicyAlgorithm):
    """Supervised fine-tuning on written solutions: minimises the mean -log pi per solution token.

    A module of its own with an ordinary loader (`rlzoo.data.sft`): no engine, no rewards, no
    rollouts. Batches are RolloutBatches whose responses are the solutions. The gradient is one mean
    over all tokens of the optimizer step, whatever its split into microbatches and ranks.

    Args:
        policy, optimizer, scheduler, tokens_per_microbatch, max_skipped_updates: as in
            `PolicyAlgorithm`.
    """

    scores, has_ratio = (), False

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        scheduler: Callable[[Optimizer], Any] | None = None,
        *,
        max_skipped_updates: AtLeast0 = 10,
        tokens_per_microbatch: AtLeast1 | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(
            policy,
            optimizer,
            scheduler,
            tokens_per_microbatch=tokens_per_microbatch,
            max_skipped_updates=max_skipped_updates,
        )

    def total_loss(self, scores: dict[str, Tensor], batch: RolloutBatch) -> LossOutput:
        """-log pi, summed over the solutions' tokens."""
        loss_sum = -(batch.weights * scores["logprobs"]).sum()
        return LossOutput(loss_sum, {"loss": loss_sum.detach()})

    @torch.no_grad()
    def mean_loss(self, batches: list[RolloutBatch]) -> float:
        """Mean -log pi per solution token, nats, over every rank's batches; NaN if there are none.

        Collective: ranks hold as many batches as each other, each its own rows of them.
        """
        total = weight = 0.0
        training = self.policy.training
        self.policy.eval()  # no dropout
        try:
            for batch in batches:
                batch = batch.to(self.device)
                with self.in_training():
                    scores = self.forward_scores(batch)
                total -= float((batch.weights * scores["logprobs"]).sum())
                weight += float(batch.weights.sum())
        finally:
            self.policy.train(training)
        totals, weights = zip(*all_gather((total, weight)), strict=True)
        return sum(totals) / sum(weights) if sum(weights) else float("nan")
