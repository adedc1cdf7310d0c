"""Floating-point operations that training needs, for its share of what a device can do (MFU).

Useful ones alone: tokens of prompts and responses and no padding, a forward and a backward pass
once (what gradient checkpointing computes again does not count), the head at response tokens.
A weight costs 2 operations a token in the forward pass and 4 in the backward pass, 2 if it is
frozen; causal attention looks at half of all pairs.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlzoo.models.gather import whole_shape
from rlzoo.models.logits import backbone_of

# Dense bfloat16 operations a second of a GPU, by what is in its name, in 1e12; its data sheet.
PEAKS = {
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def trunk_flops(model: nn.Module, lengths: Tensor) -> float | None:
    """Of the passes of a model without its head over whole sequences.

    Args:
        lengths: [N] tokens of each, prompt and response.

    Returns:
        None where weights are not used once a token (experts, convolutions) or attention is not
        over all earlier tokens.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    weights = [
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    ]
    heads = getattr(config, "num_attention_heads", None)
    if kinds != {"full_attention"} or not heads or any(len(whole_shape(w)) > 2 for w in weights):
        return None
    per_token = sum(
        (6 if weight.requires_grad else 4) * whole_shape(weight).numel()
        for weight in weights
        if len(whole_shape(weight)) == 2
    )
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    per_pair = 6 * config.num_hidden_layers * width  # of all pairs, half of which count
    lengths = lengths.double()
    return float(per_token * lengths.sum() + per_pair * lengths.square().sum())


def policy_flops(policy: PreTrainedModel, lengths: Tensor, responses: Tensor) -> float | None:
    """`trunk_flops`, and those of the head at response tokens.

    Args:
        responses: [N] response tokens of each sequence.
    """
    trunk = trunk_flops(backbone_of(policy), lengths)
    head = policy.get_output_embeddings().weight
    per_token = (6 if head.requires_grad else 4) * whole_shape(head).numel()
    return None if trunk is None else trunk + per_token * float(responses.sum())


def peak_of(device: torch.device, precision: str) -> float | None:
    """The device's peak in 1e12 operations a second; None where it is not known, as on a CPU, or
    training computes in float32.

    Args:
        precision: Lightning's name.
    """
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device)
    found = (p for part, p in PEAKS.items() if re.search(rf"\b{part}\b", name))
    return next(found, None)
