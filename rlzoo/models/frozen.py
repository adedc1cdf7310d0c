"""Models beside the policy that nothing trains: the reference, a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from rlzoo.models.gather import through
from rlzoo.models.logprobs import response_scores
from rlzoo.models.lora import adapters_off
from rlzoo.models.precision import as_trained
from rlzoo.types import RolloutBatch

SUFFIX = "_logprobs"  # a model's score is its name with this behind it


class FrozenModels(dict[str, PreTrainedModel]):
    """By name. No ModuleDict: they are among no module's parameters, and in no checkpoint."""

    def freeze(self, trainer: Trainer | None) -> None:
        """Makes them what the policy's own passes compute with, for good."""
        for model in self.values():
            as_trained(model.eval().requires_grad_(False), trainer)

    def scores(
        self, names: Iterable[str], policy: PreTrainedModel, batch: RolloutBatch, temperature: float
    ) -> dict[str, Tensor]:
        """Log-probs [B, T] of a microbatch, for those of the names that are a model's score.

        Of a policy with LoRA, the reference is the same network with its adapters off.
        """
        found = {}
        for score in names:
            name = score.removesuffix(SUFFIX)
            held: AbstractContextManager[PreTrainedModel] = adapters_off(policy)
            if name == score or (name not in self and name != "ref"):
                continue
            if name in self:
                held = nullcontext(self[name])
            with held as model:
                passed = through(model, response_scores, model, batch, temperature)
            found[score] = passed.logprobs
        return found
