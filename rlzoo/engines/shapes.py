"""What weights an engine must be given, so that a wrong sync is named before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with its modules and no weights; allocates nothing."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return model


def expected_shapes(
    config: PretrainedConfig, trust_remote_code: bool = False
) -> dict[str, torch.Size]:
    """Shape of each parameter by the name `named_parameters` gives it; allocates nothing."""
    model = empty_model(config, trust_remote_code)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def checked_weights(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they come, each compared with what is expected.

    Raises:
        RuntimeError: a name or shape that is not expected, or, at the end, one that is missing.
    """
    missing = dict(shapes)
    for name, tensor in named_tensors:
        if name not in missing:
            raise RuntimeError(
                f"The engine's model has no parameter {name}, or was given it twice."
            )
        if missing.pop(name) != tensor.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(tensor.shape)}, the engine's {tuple(shapes[name])}."
            )
        yield name, tensor
    if missing:
        raise RuntimeError(
            f"A weight sync left out {sorted(missing)[:3]} and {len(missing)} in all."
        )
