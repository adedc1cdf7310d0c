"""The numbers that models are made of, where Lightning's `precision` is not float32."""

from __future__ import annotations

import torch
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlzoo.models.gather import is_partitioned

DTYPES = {"64": torch.float64, "16": torch.float16, "bf16": torch.bfloat16}  # by Lightning's names


def as_trained(model: PreTrainedModel, trainer: Trainer | None) -> PreTrainedModel:
    """A frozen model with the very weights that the policy's own passes compute with, in place.

    Lightning and DeepSpeed convert the module that is trained and nothing beside it: a reference
    left in float32 would say of the same weights something else than the policy does, in twice the
    memory. Under `*-true`, and under `*-mixed` with DeepSpeed or FSDP, a policy computes with half
    weights throughout. Autocast halves the weights of linear layers alone, at each call; here they
    are halved once, which changes no digit, and norms and embeddings stay as they are.
    """
    name, _, kind = str(trainer.precision if trainer else "").partition("-")
    dtype = DTYPES.get(name)
    if not trainer or not dtype:
        return model
    if any(map(is_partitioned, model.parameters())):  # ZeRO-3's engine converts
        return model
    kept: list[nn.Parameter] = []
    shards = hasattr(trainer.strategy, "device_mesh")  # FSDP gathers them in half precision
    if kind != "true" and isinstance(trainer.precision_plugin, MixedPrecision) and not shards:
        linear = [m for m in model.modules() if type(m) is nn.Linear]
        halved = {id(p) for layer in linear for p in layer.parameters()}
        kept = [p for p in model.parameters() if id(p) not in halved]
        kept += model.get_input_embeddings().parameters()  # which a tied head shares
    left = {id(p) for p in kept}
    for parameter in model.parameters():  # not buffers: see `float_buffers`
        if id(parameter) not in left and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's buffers by name, as they are before a strategy converts the module.

    `*-true` halves buffers too, the frequencies of rotary embeddings among them: at position 3,000
    an angle would then be off by radians, and no engine draws from such a policy.
    """
    named = module.named_buffers()
    return {name: buffer.clone() for name, buffer in named if buffer.is_floating_point()}


def put_back(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Undoes what a conversion has done to them since."""
    for name, own in module.named_buffers():
        if name in buffers and own.dtype != buffers[name].dtype:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffers[name].to(own.device)
