from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.ranks.exchange import all_gather
from rlzoo.types import OptimizerFactory, PolicyFactory, RolloutBatch
from rlzoo.values import AtLeast0, AtLeast1


class SFT(PolicyAlgorithm):
    """Supervised fine-tuning on written solutions: minimises the mean -log pi per solution token.

    A module of its own with an ordinary loader (`rlzoo.data.sft`): no engine, no rewards, no
    rollouts. Batches are RolloutBatches whose responses are the solutions. The gradient is one mean
    over all tokens of the optimizer step, whatever its split into microbatches and ranks.

    Args:
        policy, optimizer, scheduler, max_skipped_updates: as in `PolicyAlgorithm`.
        max_tokens_per_microbatch: a larger microbatch is computed in checkpointed pieces.
    """

    scores, has_ratio = (), False

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        scheduler: Callable[[Optimizer], Any] | None = None,
        *,
        max_skipped_updates: AtLeast0 = 10,
        max_tokens_per_microbatch: AtLeast1 = 32768,
    ) -> None:
        super().__init__(
            policy,
            optimizer,
            scheduler,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            max_skipped_updates=max_skipped_updates,
        )

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        scores = self.forward_scores(batch)
        self.divisor = batch.divisor
        loss_sum = -(batch.weights * scores["logprobs"]).sum()
        self.means.update({"loss": loss_sum.detach()}, batch.weights.sum())
        return loss_sum * self.loss_scale(batch)

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
