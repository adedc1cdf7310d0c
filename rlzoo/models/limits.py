"""What a model's configuration says of the tokens it can take."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.types import Prompt

if TYPE_CHECKING:  # prompts alone need not wait for transformers
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)
STRETCHED = ("linear", "yarn")  # RoPE types that reach `factor` times as far
VARYING = ("dynamic", "longrope")  # of other frequencies for all tokens in a longer sequence


def longest_sequence(config: PretrainedConfig) -> int | None:
    """Tokens of prompt and response that a model has positions for; None without a limit.

    Where rotary frequencies vary with a sequence's length, it ends before they do: a token drawn
    early in a long response would be scored with others than it was drawn with.
    """
    config = config.get_text_config()
    limits = [value for key in POSITIONS if isinstance(value := getattr(config, key, None), int)]
    slopes = config.model_type == "bloom" or getattr(config, "alibi", False)
    if not limits or limits[0] < 1 or slopes:  # ALiBi's reach as far as asked
        return None
    longest, ends = limits[0], []
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in [ropes, *(x for x in ropes.values() if isinstance(x, dict))]:  # by kind of layer
        kind = rope.get("rope_type", rope.get("type"))
        first = rope.get("original_max_position_embeddings") or limits[0]
        if kind in STRETCHED and rope.get("factor"):
            longest = max(longest, int(first * rope["factor"]))
        if kind in VARYING:
            ends.append(int(first))
    return min([longest, *ends])


class TokenLimits(NamedTuple):
    """What a tokenizer's model takes; kept with the tokenizer, so that data can be held to it."""

    path: str
    vocabulary: int | None  # rows of the embedding
    longest: int | None  # tokens of a sequence


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises a UserError unless the tokenizer can render a chat and end a response.

    Args:
        name: of what it is the tokenizer of.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {name} has no end-of-sequence token, so no response could ever end."
            " Set eos_token in its tokenizer_config.json."
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {name} has no chat template, so prompts cannot be rendered. Choose"
            " an instruction-tuned model, or add chat_template.jinja to its directory."
        )


def limits_of(tokenizer: PreTrainedTokenizerBase) -> TokenLimits:
    """What `load_tokenizer` found; nothing is limited for a tokenizer from elsewhere."""
    return getattr(tokenizer, "token_limits", TokenLimits("the model", None, None))


def set_limits(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, path: str
) -> TokenLimits:
    """Keeps a model's limits with its tokenizer, whose end and padding must lie within them.

    Raises:
        UserError: the end-of-sequence token has no row in the embedding.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    limits = tokenizer.token_limits = TokenLimits(path, rows, longest_sequence(config))
    if rows is None:
        return limits
    if tokenizer.eos_token_id >= rows:
        raise UserError(
            f"The tokenizer of model.path={path} ends with {tokenizer.eos_token!r}, token"
            f" {tokenizer.eos_token_id}, but the model's embedding has {rows} rows (vocab_size), so"
            " no response could ever end. Use the tokenizer that the model was trained with."
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        log.warning(
            "model.path=%s: the padding token %r lies outside of the model's embedding (%d rows);"
            " %r fills batches in its place, which changes no log-prob.",
            *(path, tokenizer.pad_token, rows, tokenizer.eos_token),
        )
        tokenizer.pad_token = tokenizer.eos_token
    return limits


def check_length(
    limits: TokenLimits,
    max_prompt_tokens: int,
    max_response_tokens: int,
    longest: int | None = None,
) -> None:
    """Raises a UserError unless the longest prompt and response have positions in the model.

    Args:
        longest: tokens of the longest prompt that there is; the limit's if absent.
    """
    asked = (max_prompt_tokens if longest is None else longest) + max_response_tokens
    there = "" if longest is None else f" (the longest prompt has {longest})"
    if limits.longest is not None and asked > limits.longest:
        raise UserError(
            f"datamodule.max_prompt_tokens={max_prompt_tokens}{there} plus"
            f" datamodule.max_response_tokens={max_response_tokens} is {asked}, but"
            f" {limits.path} takes sequences of at most {limits.longest} tokens. Lower one of the"
            " two. (It says so in its config.json: rope_scaling there extends rotary positions;"
            " beyond the first length of rope_type dynamic and longrope, early tokens would be"
            " scored with other frequencies than they were drawn with.)"
        )


def check_prompts(limits: TokenLimits, prompts: Iterable[Prompt]) -> None:
    """Raises a UserError if a prompt has a token that the model's embedding has not."""
    for prompt in prompts:
        check_ids(limits, f"Prompt {prompt.id!r}", max(prompt.token_ids, default=0))


def check_example(limits: TokenLimits, prompt: Prompt, response: Tensor) -> None:
    """The same for a prompt with its response, [L], which must have positions too."""
    check_prompts(limits, [prompt])
    check_ids(limits, f"The solution of {prompt.id!r}", int(response.max()))
    length = len(prompt.token_ids) + len(response)
    if limits.longest is not None and length > limits.longest:
        raise UserError(
            f"Example {prompt.id!r} is {length} tokens long with its solution, but {limits.path}"
            f" takes sequences of at most {limits.longest} tokens. Leave longer examples out of the"
            " data."
        )


def check_ids(limits: TokenLimits, what: str, largest: int) -> None:
    if limits.vocabulary is not None and largest >= limits.vocabulary:
        raise UserError(
            f"{what} has token {largest}, but the embedding of model.path={limits.path} has"
            f" {limits.vocabulary} rows: its tokenizer has tokens that were added without resizing"
            " the model (resize_token_embeddings), or is of another model. Use the model's own"
            " tokenizer, or leave such text out."
        )
