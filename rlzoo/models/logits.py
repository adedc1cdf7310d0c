"""From a model's last hidden states to its logits, as its own `forward` has it.

rlzoo calls backbone and head apart, so that [tokens, V] never stands in memory whole. What a family
does to its logits after the head (Gemma 2 caps them, Cohere and Granite scale them) is told by its
configuration; `rlzoo.models.checks` compares the result with the model's own `forward`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlzoo.models.gather import whole_shape

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")  # logits are multiplied by them
DIVISORS = ("logits_scaling",)  # logits, or the hidden states before the head, are divided by them
MULTIPLIED = ("hyperclovax",)  # families whose DIVISORS are factors
UNUSED = {"mpt": ("logit_scale",)}  # keys that a family declares and transformers does not use


class LogitTransform(NamedTuple):
    """Elementwise: cap * tanh(scale * z / cap) of the head's output z; without a cap scale * z."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to the head's output, where they are `logits`."""
        if self.cap is None:
            return self.scale
        return self.scale * (1 - (logits / self.cap).square())


PLAIN = LogitTransform()


def transform_of(policy: PreTrainedModel) -> LogitTransform:
    """What a model's configuration says of its logits; PLAIN for a module without one."""
    config = getattr(policy, "config", None)
    if not isinstance(config, PretrainedConfig):
        return PLAIN
    config, scale = config.get_text_config(), 1.0
    divided = config.model_type not in MULTIPLIED
    for key in (*FACTORS, *DIVISORS):
        value = getattr(config, key, None)
        if value is not None and key not in UNUSED.get(config.model_type, ()):
            scale *= 1 / value if key in DIVISORS and divided else value
    caps = [cap for key in CAPS if (cap := getattr(config, key, None)) is not None]
    return LogitTransform(float(scale), float(caps[0]) if caps else None)


def backbone_of(policy: PreTrainedModel) -> nn.Module:
    """The part of a causal model that makes its last hidden states."""
    base = policy.base_model
    if base is policy:  # where base_model_prefix names no attribute, as Llama 4's does
        base = getattr(policy, "model", policy)
    return base


def hidden_size(head: nn.Module) -> int:
    """D of the hidden states that a head takes, also where its weight is sharded."""
    return getattr(head, "in_features", None) or whole_shape(head.get_parameter("weight"))[-1]


def vocabulary_size(head: nn.Module) -> int:
    """V of the logits that a head makes, also where its weight is sharded."""
    return getattr(head, "out_features", None) or whole_shape(head.get_parameter("weight"))[0]
