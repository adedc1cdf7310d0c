"""Whole parameters from sharded ones, and forward passes around which sharding hooks run.

Collective under FSDP and ZeRO-3: every rank makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed as integration

T = TypeVar("T")


def whole(tensor: Tensor) -> Tensor:
    """FSDP's DTensor gathered; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter whole, by its name, one at a time, so that no process holds the model twice.

    What is yielded may be kept: it is no buffer that the next step overwrites.
    """
    for name, parameter in named_parameters:
        if is_partitioned(parameter):
            with gathered_in_place([parameter]):
                yield name, parameter.data.clone()
        else:
            yield name, whole(parameter)


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A module's state_dict whole, on the CPU, tied weights under each of their names; collective.

    Args:
        keep: False on ranks that only take part, which get an empty one.
    """
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}  # by parameter: the name it is kept under
    for name, tensor in module.state_dict(keep_vars=True).items():
        if (other := first.setdefault(id(tensor), name)) != name:
            found |= {name: found[other]} if keep else {}
            continue
        for _, full in gathered([(name, tensor)]):
            found |= {name: full.detach().cpu()} if keep else {}
    return found


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds it in parts."""
    return hasattr(parameter, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Also where ZeRO-3 holds it in parts."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def gathered_in_place(
    parameters: Iterable[Tensor], modify: bool = False
) -> AbstractContextManager[None]:
    """Within it, ZeRO-3's parameters are whole; others always are.

    Args:
        modify: whether rank 0's changes are kept, on every rank.
    """
    parts = [p for p in parameters if is_partitioned(p)]
    if not parts:
        return nullcontext()
    import deepspeed

    rank = 0 if modify else None
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parts, rank)
    return context


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`module.load_state_dict` from whole tensors, also where ZeRO-3 holds the module in parts.

    Raises:
        RuntimeError: names or shapes differ.
    """
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    if not any(map(is_partitioned, own.values())):
        module.load_state_dict(state)
        return
    for name, tensor in state.items():
        shape = whole_shape(own[name]) if name in own else None
        if shape != tensor.shape:
            raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}, the model's is {shape}")
        with torch.no_grad(), gathered_in_place([own[name]], modify=True):
            own[name].data.copy_(tensor)


@contextmanager
def loading_whole() -> Iterator[None]:
    """Within it, transformers loads models whole where ZeRO-3 has it load them in parts."""
    reference = integration._hf_deepspeed_config_weak_ref
    held = None if reference is None else reference()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if held is not None:
            integration.set_hf_deepspeed_config(held)


def through(module: nn.Module, function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), run as if it were the module's forward, if FSDP shards the module.

    FSDP gathers a module's own parameters around its forward alone, and rlzoo calls the backbone
    and the head, never the whole policy, so that logits never stand in memory whole.
    """
    if not isinstance(module, FSDPModule):
        return function(*arguments)
    return as_forward(module, function, *arguments)


def as_forward(module: nn.Module, function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), run as if it were the module's forward, with all hooks around it."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        found: T = module(*arguments)
        return found
    finally:
        if own is None:
            del module.forward  # the class's is in force again
        else:
            module.forward = own
