"""Policies and tokenizers, from a directory in Hugging Face format or from this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from rlzoo.checkpoints import is_checkpoint, policy_weights
from rlzoo.errors import UserError
from rlzoo.models.gather import load_whole, loading_whole
from rlzoo.models.lora import add_lora

TINY = Path(__file__).parent / "tiny"  # the policy shipped with rlzoo


def model_directory(path: str, key: str = "model.path") -> str:
    """A directory with a model, or "tiny" for the one shipped, or a hub name.

    Raises:
        UserError: a local path that is no model directory.
    """
    if path == "tiny":
        return str(TINY)
    local = Path(path)
    if local.is_dir() and not (local / "config.json").is_file():
        raise UserError(
            f"{key}={path} is a directory without config.json, so no model. Give a directory made"
            " by save_pretrained, a hub name, or 'tiny'."
        )
    if not local.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(
            f"{key}={path} does not exist. Give a directory made by save_pretrained, a hub name"
            " such as Qwen/Qwen2.5-Math-1.5B, or 'tiny'."
        )
    return path


def load_policy(
    path: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    init_from: str | None = None,
    lora: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A causal language model, ready to be trained.

    Args:
        path: see `model_directory`.
        dtype: of the weights: float32, bfloat16 or float16.
        attention: transformers' attn_implementation.
        gradient_checkpointing: recompute activations in the backward pass.
        trust_remote_code: run code that a hub model brings along.
        init_from: takes the weights, and nothing else, from an rlzoo checkpoint or from
            another model directory of the same architecture. Adapters that a checkpoint has are
            merged into them.
        lora: trains low-rank adapters alone, see `rlzoo.models.lora`; None trains all weights.

    Raises:
        UserError: no model there, weights that do not fit it, or bad settings of LoRA.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"model.dtype must be float32, bfloat16 or float16; got {dtype!r}.")
    try:
        policy = AutoModelForCausalLM.from_pretrained(
            model_directory(path),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    except OSError as error:
        raise UserError(f"model.path={path} could not be loaded: {first_line(error)}") from error
    if init_from is not None:
        load_weights(policy, init_from)
    if lora is not None:
        add_lora(policy, lora)
    if gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    return policy


def load_weights(policy: nn.Module, source: str) -> None:
    """Copies weights into a policy from a checkpoint (.ckpt), sharded or not, or a model directory."""
    if is_checkpoint(Path(source)):
        state = policy_weights(Path(source).resolve())
    else:
        directory = model_directory(source, key="init_from")
        with loading_whole():
            state = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    try:
        load_whole(policy, state)
    except RuntimeError as error:
        raise UserError(
            f"init_from={source} holds other weights than the model has: {first_line(error)}"
        ) from error


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
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of model.path={path} has no end-of-sequence token, so no response"
            " could ever end. Set eos_token in its tokenizer_config.json."
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of model.path={path} has no chat template, so prompts cannot be"
            " rendered. Add chat_template.jinja to its directory."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's, and the model's generation config's."""
    try:
        extra = GenerationConfig.from_pretrained(model_directory(path)).eos_token_id
    except OSError:
        extra = None
    extra = extra if isinstance(extra, list) else [extra]
    return sorted({tokenizer.eos_token_id, *(token for token in extra if token is not None)})


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
