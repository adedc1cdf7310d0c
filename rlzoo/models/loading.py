"""Model directories read with every weight accounted for: none missing, left over, cut or NaN."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlzoo.errors import UserError
from rlzoo.models.finite import broken_weights
from rlzoo.models.gather import is_partitioned, loading_whole
from rlzoo.ranks.exchange import all_gather

T = TypeVar("T")
TINY = Path(__file__).parent / "tiny"  # the policy shipped with rlzoo
BENIGN = re.compile(  # left over in old checkpoints: buffers that are no weights
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$|position_ids$"
)


def model_directory(path: str, key: str = "model.path") -> str:
    """A directory with a model, or "tiny" for the one shipped, or a hub name.

    Raises:
        UserError: a local path that is no model directory.
    """
    if path == "tiny":
        return str(TINY)
    local = Path(path).expanduser()
    if local.is_dir():
        check_directory(local, f"{key}={path}")
    elif local.is_file():
        raise UserError(
            f"{key}={path} is a file. Give the directory that holds config.json and the weights; a"
            " GGUF file must be converted first (AutoModelForCausalLM.from_pretrained(FOLDER,"
            " gguf_file=NAME).save_pretrained(DIRECTORY))."
        )
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"{key}={path} does not exist. Give a directory made by save_pretrained, a hub name"
            " such as Qwen/Qwen2.5-Math-1.5B, or 'tiny'."
        )
    return str(local) if local.exists() else path


def check_directory(local: Path, source: str) -> None:
    """Raises a UserError for a directory that holds no whole model."""
    if (local / "adapter_config.json").is_file():
        raise UserError(
            f"{source} holds adapters (adapter_config.json), which change another model. Merge them"
            " into it first (peft's merge_and_unload, then save_pretrained with the tokenizer), and"
            " give that directory; a run of rlzoo leaves both, policy/ is the merged model."
        )
    if (local / "config.json").is_file():
        return
    inside = sorted(child.parent.name for child in local.glob("*/config.json"))
    hint = f" It has models inside: {', '.join(inside[:5])}." if inside else ""
    raise UserError(
        f"{source} is a directory without config.json, so no model.{hint} Give a directory made"
        " by save_pretrained, a hub name, or 'tiny'."
    )


def load_config(
    path: str, trust_remote_code: bool = False, key: str = "model.path"
) -> PretrainedConfig:
    """A model directory's configuration.

    Raises:
        UserError: none there, one that transformers cannot read, or of quantised weights.
    """
    directory, source = model_directory(path, key), f"{key}={path}"
    config: PretrainedConfig = told(
        source, lambda: AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    )
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings:
            settings = settings if isinstance(settings, dict) else settings.to_dict()
            raise UserError(
                f"{source} has quantised weights ({settings.get('quant_method', 'quantization')} in"
                " quantization_config of its config.json), which cannot be trained or sent to an"
                " engine. Give the model's plain weights, or a copy made whole with transformers"
                " (load it with dequantize=True, then save_pretrained)."
            )
    return config


def load_model(
    path: str,
    *,
    dtype: torch.dtype | str,
    attention: str | None = None,
    trust_remote_code: bool = False,
    key: str = "model.path",
) -> PreTrainedModel:
    """A causal language model whose weights are all in its files and finite.

    Raises:
        UserError: no model there, or weights that are missing, left over, of another shape, cut
            short or not finite, by their names.
    """
    load_config(path, trust_remote_code, key)
    directory, source = model_directory(path, key), f"{key}={path}"

    def load(**where: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return AutoModelForCausalLM.from_pretrained(  # type: ignore[return-value]  # see below
            directory,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,  # so that a pair is returned
            ignore_mismatched_sizes=True,  # `check_names` refuses them, by name
            **where,
        )

    if is_deepspeed_zero3_enabled():  # transformers looks at no names and shapes then
        with loading_whole():
            empty, found = told(source, lambda: load(device_map="meta"))
        check_names(found, empty, source)
    policy, found = told(source, load)
    check_names(found, policy, source)
    check_tied(policy, Path(directory), source)
    check_finite(policy, source)
    check_padding_row(policy, Path(directory), source)
    freeze_other_parts(policy)
    return policy


def check_names(found: dict[str, Any], model: nn.Module, source: str) -> None:
    """Raises a UserError unless files and model have the same weights.

    Args:
        found: transformers' loading info.
    """
    family = type(model).__name__
    other = found["mismatched_keys"]
    extra = [name for name in found["unexpected_keys"] if not BENIGN.search(name)]
    faults = {
        "lacks": set(found["missing_keys"]) - {name for name, *_ in other},
        "has weights of another shape:": [
            f"{name} {tuple(file)} for {tuple(own)}" for name, file, own in other
        ],
        "has weights that such a model does not have:": extra,
        "could not be read:": found.get("error_msgs") or [],
    }
    told_of = [f"{what} {some(names)}" for what, names in faults.items() if names]
    if told_of:
        raise UserError(
            f"{source} is not a whole {family}: it {'; it '.join(told_of)}. What is missing would"
            " be random, what is left over would be ignored. Give a directory that save_pretrained"
            f" of {family} wrote, or set in its config.json what the weights are of (architectures,"
            " tie_word_embeddings, vocab_size)."
        )


def some(names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def check_tied(policy: PreTrainedModel, directory: Path, source: str) -> None:
    """Refuses two weights in the files for what config.json ties. transformers would leave them
    apart; whatever is built from the same config.json (an engine, an export) would not."""
    tied = getattr(policy, "_tied_weights_keys", None)
    if not getattr(policy.config, "tie_word_embeddings", False) or not isinstance(tied, dict):
        return
    for name, other in policy.get_expanded_tied_weights_keys(all_submodels=True).items():
        apart = name not in policy.all_tied_weights_keys
        if not apart and is_deepspeed_zero3_enabled():
            # transformers has compared what it does not hold
            ours, theirs = stored(directory, name), stored(directory, other)
            apart = ours is not None and theirs is not None and not torch.equal(ours, theirs)
        if apart:
            raise UserError(
                f"{source}: its files hold another {name} than {other}, but its config.json ties"
                " the two (tie_word_embeddings=true), so that an engine or whoever loads policy/"
                " would have another model. Set tie_word_embeddings to false there, or leave the"
                " wrong one out of the files."
            )


def check_finite(policy: PreTrainedModel, source: str) -> None:
    """Raises a UserError that names weights with NaN or infinite values. Collective where ZeRO-3
    holds the model in parts."""
    bad = broken_weights(policy.named_parameters())
    if any(map(is_partitioned, policy.parameters())):
        bad = [name for names in all_gather(bad) for name in names]
    if bad:
        raise UserError(
            f"{source} has weights that are NaN or infinite: {some(set(bad))}. A run that failed"
            " may have written them; take an earlier checkpoint, or the model it began with."
        )


def check_padding_row(policy: PreTrainedModel, directory: Path, source: str) -> None:
    """Refuses a family that zeroes a loaded embedding's padding row (youtu in transformers 5.19):
    padding may be a token that is drawn."""
    embedding = policy.get_input_embeddings()
    padding = getattr(embedding, "padding_idx", None)
    if padding is None or is_partitioned(weight := embedding.get_parameter("weight")):
        return
    name = next(name for name, p in policy.named_parameters() if p is weight)
    row = stored(directory, name, slice(padding, padding + 1))
    if row is None:
        return
    if not torch.equal(row.to(weight)[0], weight[padding].detach()):
        raise UserError(
            f"{source}: transformers loads {type(policy).__name__} with another embedding of token"
            f" {padding} (pad_token_id) than its file has. Choose another family or version of it."
        )


def stored(directory: Path, name: str, rows: slice = slice(None)) -> Tensor | None:
    """Rows of a tensor as a local directory's safetensors have it; None if they do not, by name."""
    index = directory / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    file = directory / shards.get(name, "model.safetensors")
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as weights:
        return weights.get_slice(name)[rows] if name in weights.keys() else None


def freeze_other_parts(policy: PreTrainedModel) -> None:
    """Freezes what text never passes through (a vision tower), so that no rank waits for it."""
    if policy.config.get_text_config() is policy.config:
        return
    parts = (policy.get_decoder(), policy.get_output_embeddings())
    text = {id(p) for part in parts if part is not None for p in part.parameters()}
    for parameter in policy.parameters():
        parameter.requires_grad_(id(parameter) in text)


def told(source: str, load: Callable[[], T]) -> T:
    """What `load` returns; whatever transformers raises becomes a message in rlzoo's keys."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(load_problem(source, error)) from error


def load_problem(source: str, error: Exception) -> str:
    """What to tell the user of an error of transformers' while it reads a model."""
    said = " ".join(str(error).split()).rstrip(".")
    low = said.lower()
    if "trust_remote_code" in low or "custom code" in low:
        return (
            f"{source} brings its own code, which is run only with model.trust_remote_code=true."
            " Read it first: it can do whatever you can."
        )
    if "unrecognized configuration class" in low:
        kind = re.search(r"'[\w.]*?(\w+)'", said)
        return (
            f"{source} is no causal language model: transformers has no such model for"
            f" {kind.group(1) if kind else 'its configuration'}. Encoder-decoders, encoders and"
            " classifiers cannot be trained here; choose a decoder."
        )
    if any(word in low for word in ("attention implementation", "attn_implementation", "flash")):
        return (
            f"{source} cannot have the attention asked for with model.attention:"
            f" {ours(said).split('. ')[0]}."
            " Take model.attention=eager, which every family has, or sdpa."
        )
    if "does not recognize this architecture" in low or "model type" in low or "model_type" in low:
        return (
            f"{source} is of a kind that this version of transformers does not know:"
            f" {said[:200]}. Correct model_type in its config.json, or install a version that knows"
            " it."
        )
    if "padding_idx must be within" in low:
        return (
            f"{source} names a padding token outside of its embedding: pad_token_id in its"
            " config.json must be below vocab_size, or null."
        )
    if "connect" in low or "huggingface.co" in low:
        return (
            f"{source} is no directory here, and could not be fetched from the hub: {said[:200]}."
            " Give a directory, or look at the name and the network."
        )
    return (
        f"{source} could not be loaded: {type(error).__name__}: {ours(said)[:400]}. A file may be"
        " missing, cut short or a Git LFS pointer, or config.json hold what transformers does not"
        " know: compare the directory's files with the original's."
    )


def ours(said: str) -> str:
    """A message of transformers' with rlzoo's names for its arguments."""
    said = said.replace("attn_implementation", "model.attention")
    return said.replace("torch_dtype", "model.dtype")
