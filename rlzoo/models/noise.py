"""Dropout and router jitter of a model's own configuration, switched off.

The policy that is scored and trained is the one that drew: its passes repeat. LoRA's dropout is
another matter, see `rlzoo.models.lora.TrainingDropout`.
"""

from __future__ import annotations

import copy

from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel

NOISY = ("drop", "jitter")  # in the names of rates: attn_pdrop, layerdrop, router_jitter_noise


def switch_off_noise(policy: PreTrainedModel) -> None:
    """Sets every rate of dropout, dropped layers and router jitter to 0, in place.

    Rates that a forward pass reads from the configuration are 0 in a copy that the parts hold;
    `policy.config`, which an export writes, stays as it was.
    """
    quiet: dict[int, PretrainedConfig] = {}
    for module in policy.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in rates(vars(module)):
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and module is not policy:
            vars(module)["config"] = quiet.setdefault(id(config), without_noise(config))


def without_noise(config: PretrainedConfig) -> PretrainedConfig:
    """A copy whose rates are 0; the configuration itself if it has none."""
    noisy = rates(vars(config))
    if not noisy:
        return config
    found = copy.deepcopy(config)
    for name in noisy:
        setattr(found, name, 0.0)
    return found


def rates(attributes: dict[str, object]) -> list[str]:
    return [
        name
        for name, value in attributes.items()
        if isinstance(value, float) and value > 0 and any(word in name.lower() for word in NOISY)
    ]
