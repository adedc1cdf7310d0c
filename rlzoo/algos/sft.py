from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlzoo.algos.optimization import OptimizationModule
from rlzoo.logprobs import response_scores
from rlzoo.metrics import WeightedMeans
from rlzoo.models.gather import through
from rlzoo.types import OptimizerFactory, PolicyFactory, RolloutBatch
from rlzoo.values import AtLeast0


class SFT(OptimizationModule):
    """Supervised fine-tuning on written solutions: minimises the mean -log pi per solution token.

    A module of its own with an ordinary loader (`rlzoo.data.sft`): no engine, no rewards, no
    rollouts. Batches are RolloutBatches whose responses are the solutions.

    Args:
        policy, optimizer, scheduler, max_skipped_updates: as in `PolicyAlgorithm`.
    """

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        scheduler: Callable[[Optimizer], Any] | None = None,
        *,
        max_skipped_updates: AtLeast0 = 10,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, max_skipped_updates=max_skipped_updates)
        self.means = WeightedMeans()  # of the step, over tokens

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        scores = through(self.policy, response_scores, self.policy, batch, 1.0)
        self.divisor = batch.divisor
        loss_sum = -(batch.weights * scores.logprobs).sum()
        self.means.update({"loss": loss_sum.detach()}, batch.weights.sum())
        return loss_sum * self.trainer.world_size / batch.divisor  # the strategy averages over ranks

    @torch.no_grad()
    def mean_loss(self, batches: list[RolloutBatch]) -> float:
        """Mean -log pi per solution token over some batches, nats."""
        total = weight = 0.0
        for batch in batches:
            batch = batch.to(self.device)
            scores = through(self.policy, response_scores, self.policy, batch, 1.0)
            total -= float((batch.weights * scores.logprobs).sum())
            weight += float(batch.weights.sum())
        return total / weight
