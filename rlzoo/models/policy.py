"""Policies and tokenizers, from a directory in Hugging Face format or from this package."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from rlzoo.errors import UserError, first_line
from rlzoo.models.checkpoints import is_checkpoint, policy_weights
from rlzoo.models.checks import can_be_checked, check_policy
from rlzoo.models.gather import load_whole, loading_whole, whole_shape
from rlzoo.models.limits import check_tokenizer, set_limits
from rlzoo.models.loading import check_finite, load_config, load_model, model_directory, some
from rlzoo.models.lora import add_lora
from rlzoo.models.noise import switch_off_noise
from rlzoo.models.packed import AUTO, loaded_with, settle_attention
from rlzoo.types import PolicyFactory

log = logging.getLogger(__name__)


def load_policy(
    path: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: str = AUTO,
    gradient_checkpointing: bool | Literal["auto"] = False,
    trust_remote_code: bool = False,
    init_from: str | None = None,
    lora: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model, ready to be trained.

    Args:
        path: see `model_directory`.
        dtype: of the weights: float32, bfloat16 or float16.
        attention: transformers' attn_implementation, "packed" (rows stand one after another), or
            "auto": packed where the family can be, else sdpa, or eager.
        gradient_checkpointing: recompute activations in the backward pass; "auto" where there is
            CUDA and the family can.
        trust_remote_code: run code that a hub model brings along.
        init_from: takes the weights, and nothing else, from an rlzoo checkpoint or from
            another model directory of the same architecture. Adapters that a checkpoint has are
            merged into them.
        lora: trains low-rank adapters alone, see `rlzoo.models.lora`; None trains all weights.

    Raises:
        UserError: no model there; weights that are missing, left over, broken or do not fit it; a
            family whose log-probs rlzoo cannot take; or bad settings of LoRA.
    """
    if dtype == "float16" and lora is None:
        raise UserError(
            "model.dtype=float16 cannot hold weights that train: the optimizer's smallest numbers"
            " are 0 in it, and the first update makes NaN. Take model.dtype=float32 or"
            " bfloat16; frozen weights under model.lora may be float16."
        )
    if attention == "flex_attention" and not torch.cuda.is_available():
        raise UserError(
            "model.attention=flex_attention has no backward pass on a CPU, so nothing could be"
            " trained. Take model.attention=sdpa or eager."
        )
    policy = load_frozen(path, dtype, attention, trust_remote_code, init_from)
    if lora is not None:
        add_lora(policy, lora)
    if gradient_checkpointing == "auto":
        gradient_checkpointing = (
            torch.cuda.is_available() and policy.supports_gradient_checkpointing
        )
    if gradient_checkpointing:
        enable_checkpointing(policy, f"model.path={path}")
    return policy


def load_frozen(
    path: str,
    dtype: str = "float32",
    attention: str = AUTO,
    trust_remote_code: bool = False,
    init_from: str | None = None,
) -> PreTrainedModel:
    """The same model as `load_policy`, for an engine: without adapters, in any dtype."""
    policy = load_model(
        path,
        dtype=getattr(torch, dtype),
        attention=loaded_with(attention),
        trust_remote_code=trust_remote_code,
    )
    source = f"model.path={path}"
    if init_from is not None:
        load_weights(policy, init_from, trust_remote_code)
        source = f"{source} with init_from={init_from}"
    switch_off_noise(policy)
    if can_be_checked(policy):
        check_policy(policy, source)
        settle_attention(policy, attention, source)
    else:
        vars(policy)["unchecked"] = source, attention  # until its strategy has placed it
    return policy


def without_lora(policy: PolicyFactory) -> PolicyFactory:
    """Builds the same model without adapters; an engine is given merged weights."""
    if not isinstance(policy, functools.partial) or policy.keywords.get("lora") is None:
        return policy
    if policy.func is not load_policy:
        return functools.partial(policy, lora=None)
    kept = {k: v for k, v in policy.keywords.items() if k not in ("lora", "gradient_checkpointing")}
    return functools.partial(load_frozen, *policy.args, **kept)


def enable_checkpointing(policy: PreTrainedModel, source: str) -> None:
    try:
        policy.gradient_checkpointing_enable()
    except ValueError as error:
        raise UserError(
            f"{source}: {type(policy).__name__} cannot recompute its activations. Set"
            " model.gradient_checkpointing=false."
        ) from error


def load_weights(policy: PreTrainedModel, source: str, trust_remote_code: bool = False) -> None:
    """Copies weights into a policy from a checkpoint, sharded or not, or from a model directory.

    Raises:
        UserError: it holds other weights than the policy has, by their names, or some are NaN.
    """
    place = Path(source).expanduser()
    if is_checkpoint(place):
        state = checkpoint_weights(place.resolve(), source)
    else:
        with loading_whole():
            model = load_model(
                source, dtype="auto", trust_remote_code=trust_remote_code, key="init_from"
            )
        compare_configs(policy, model, source)
        state = model.state_dict()
    check_state(policy, state, source)
    load_whole(policy, state)
    check_finite(policy, f"init_from={source}")


def checkpoint_weights(path: Path, source: str) -> dict[str, Tensor]:
    """`policy_weights`, with a message where the file is none of rlzoo's."""
    try:
        return policy_weights(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"init_from={source} is no checkpoint of rlzoo's that can be read"
            f" ({type(error).__name__}: {first_line(error)[:200]}). Give a .ckpt of a run, which"
            " may have been cut short, or a model directory."
        ) from error


def check_state(policy: PreTrainedModel, state: Mapping[str, Tensor], source: str) -> None:
    """Raises a UserError unless a state has the policy's weights, all of them and no others."""
    own = policy.state_dict(keep_vars=True)
    shared = own.keys() & state.keys()
    faults = {
        "lacks": own.keys() - state.keys(),
        "has also": state.keys() - own.keys(),
        "has another shape of": [n for n in shared if whole_shape(own[n]) != whole_shape(state[n])],
        "has two values for what the model ties:": untied(own, state),
    }
    told_of = [f"it {what} {some(names)}" for what, names in faults.items() if names]
    if told_of:
        raise UserError(
            f"init_from={source} holds other weights than {type(policy).__name__} of model.path"
            f" has: {'; '.join(told_of)}. Take weights of the same architecture, sizes and"
            " tie_word_embeddings."
        )


def untied(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Names that are one parameter of the policy's and different ones of a state's."""
    first: dict[int, str] = {}
    return [
        name
        for name, tensor in own.items()
        if name in state
        and (other := first.setdefault(id(tensor), name)) != name
        and not torch.equal(state[name], state[other])
    ]


def compare_configs(policy: PreTrainedModel, other: PreTrainedModel, source: str) -> None:
    """Refuses another architecture; says what else differs, since weights alone are taken."""
    if type(policy) is not type(other):
        raise UserError(
            f"init_from={source} is a {type(other).__name__}, model.path a {type(policy).__name__}:"
            " their weights mean different things. Take weights of the same architecture."
        )
    leave = ("token_id", "dtype", "use_cache", "architectures", "drop", "transformers_version")
    ours, theirs = (m.config.get_text_config().to_dict() for m in (policy, other))
    differing = [
        f"{key}={ours.get(key)} (there {theirs.get(key)})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
        and not key.startswith("_")
        and not any(word in key for word in leave)
    ]
    if differing:
        log.warning(
            "init_from=%s: weights alone are taken; of config.json, model.path's stands: %s.",
            *(source, ", ".join(differing)),
        )


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; its pad token falls back to the end-of-sequence token.

    Raises:
        UserError: no tokenizer there, or one without chat template or end-of-sequence token.
    """
    directory = model_directory(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={path} has no tokenizer: {first_line(error)}") from error
    check_tokenizer(tokenizer, f"model.path={path}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_limits(tokenizer, load_config(path, trust_remote_code), path)
    return tokenizer


def eos_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's, and the model's generation config's.

    Raises:
        UserError: a generation_config.json that cannot be read, or names no tokens.
    """
    name = "generation_config.json"
    file = cached_file(
        model_directory(path),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        extra = None if file is None else json.loads(Path(file).read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"model.path={path} has a {name} that cannot be read ({first_line(error)[:200]}), so it"
            " is not known which tokens end a response. Mend it, or remove it: the tokenizer's end"
            " token is then the only one."
        ) from error
    extra = [] if extra is None else extra if isinstance(extra, list) else [extra]
    if not all(type(token) is int for token in extra):
        raise UserError(
            f"model.path={path} has eos_token_id={extra} in its {name}: a response ends with token"
            " ids, which are whole numbers. Correct it there, or remove it."
        )
    return sorted({tokenizer.eos_token_id, *extra})
