"""Random policies of real shapes, with a tokenizer, whose responses end when a bench wants them to.

A random policy draws any token, its end token too, once in a vocabulary. Here one dimension of the
hidden states is the same at every position: embeddings put `CONSTANT` there and no layer writes to
it. The head's row of the end token looks at that dimension alone, so every token ends a response
with the same probability: 0, or `1 / mean_length`, which gives skewed (geometric) lengths.
"""

from __future__ import annotations

import json
import math
import random
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Tokenizer,
)

CONSTANT = 0.5
SPECIAL = ("<|end|>", "<|pad|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPES = ("1m", "25m", "135m")


def config_of(shape: str) -> PretrainedConfig:
    """1m: for trying things out; 25m: a Qwen2 with 32,000 tokens; 135m: SmolLM2-135M's."""
    ends: dict[str, Any] = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    if shape == "135m":
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
            **ends,
        )
    width, layers, vocabulary = {"1m": (64, 2, 2000), "25m": (384, 8, 32000)}[shape]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32 if shape == "1m" else 6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **ends,
    )


def make_policy(shape: str, mean_length: float | None = None, seed: int = 0) -> PreTrainedModel:
    """A policy of this shape.

    Args:
        mean_length: of responses without a limit, tokens; None: they never end.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(shape)).eval()
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = CONSTANT
    embedding[0] = 0.0  # the end token's row, which a tied head shares
    embedding[0, 0] = -CONSTANT
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # what a layer adds
            weight[0] = 0
    if mean_length is not None:
        embedding[0, 0] = end_weight(model, 1 / mean_length)
    return model


@torch.no_grad()
def end_weight(model: PreTrainedModel, share: float) -> float:
    """What the end token's row must have in the constant dimension, so that `share` of all draws
    are the end token."""
    ids = torch.randint(len(SPECIAL), model.config.vocab_size, (4, 32))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    others = model.get_output_embeddings()(hidden)[..., 1:].logsumexp(-1)
    logit = others.mean() + math.log(share / (1 - share))
    return float(logit / hidden[..., 0].mean())


def make_tokenizer(vocabulary: int) -> Qwen2Tokenizer:
    """A token for each byte of a question, and words of its own for all that a policy may draw."""
    words = [*SPECIAL, *ByteLevel.alphabet()]
    words += [f"w{i}" for i in range(len(words), vocabulary)]
    tokens = {word: i for i, word in enumerate(words)}
    ends = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[1], "unk_token": SPECIAL[1]}
    tokenizer = Qwen2Tokenizer(vocab=tokens, merges=[], additional_special_tokens=SPECIAL, **ends)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_policy(folder: Path, shape: str, mean_length: float | None = None) -> int:
    """Saves a policy and its tokenizer; how many parameters it has."""
    model = make_policy(shape, mean_length)
    model.save_pretrained(folder)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def write_questions(path: Path, count: int, length: int) -> None:
    """JSON lines of questions of `length` tokens each."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            question = "".join(draw.choices(string.ascii_lowercase, k=length))
            file.write(json.dumps({"question": question, "answer": "1"}) + "\n")
