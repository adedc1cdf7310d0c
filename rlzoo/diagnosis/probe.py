"""The same tokens through the trainer's and the engine's model: stale weights show, wherever.

The tokens are those of training prompts, from where these begin to differ: of tokens at random,
log-probs lie near -20, and half precision moves them several times as far as those of text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from rlzoo.diagnosis.causes import EXACT, Evidence, Probe, Setting, Suspect, size_of
from rlzoo.diagnosis.suspects import residual, suspects
from rlzoo.engines.base import Engine, SamplingParams, weights_checksum
from rlzoo.models.logits import vocabulary_size
from rlzoo.models.logprobs import sequence_logprobs
from rlzoo.types import BatchRow, Prompt

SEQUENCES, LENGTH = 8, 16  # of the probe; tokens
PROBE_TOLERANCE = 1e-3  # mean nats a token of the probe where both sides compute in float32
HALF_GAP = 0.1  # nats a token of the probe that half precision on one side alone can explain


class Trainee(Protocol):
    """What a comparison of engine and trainer asks of the module that is trained."""

    policy: PreTrainedModel
    temperature: float
    evidence: Evidence

    @property
    def trainer(self) -> Trainer: ...

    @property
    def device(self) -> torch.device: ...

    def in_training(self) -> AbstractContextManager[None]: ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]: ...


def setting_of(
    module: Trainee,
    engine: Engine,
    params: SamplingParams | None = None,
    bos: int | None = None,
    autocast: bool = True,
) -> Setting:
    """What the configuration says of both sides.

    Args:
        params: of the run's sampling.
        bos: the tokenizer's first token, if it has one.
        autocast: whether the trainer's passes are those of training; otherwise they compute in the
            dtype of its weights.
    """
    weights = next(module.policy.parameters())
    held = str(weights.dtype).removeprefix("torch.")
    computes = {"bf16": "bfloat16", "16-": "float16", "tra": "float8"}
    named = str(module.trainer.precision) if autocast else ""
    dtype = next((d for start, d in computes.items() if named.startswith(start)), held)
    if dtype == "float32" and weights.is_cuda and torch.get_float32_matmul_precision() != "highest":
        dtype = "tf32"
    return Setting(
        trainer=dtype,
        weights=held,
        engine=engine.dtype,
        cache=str(getattr(engine, "kv_cache_dtype", "auto")),
        bos=bos,
        left_out=left_out_by(params),
    )


def left_out_by(params: SamplingParams | None) -> str:
    """The keys by which the run itself truncates what it samples from."""
    if params is None:
        return ""
    set_ = {"top_p": params.top_p < 1, "top_k": params.top_k > 0}
    return " and ".join(f"datamodule.{k}={getattr(params, k)}" for k, on in set_.items() if on)


def tolerance(setting: Setting, found: Sequence[Suspect] = ()) -> float:
    """Mean |trainer - engine| of the probe that number formats alone can explain, nats."""
    return PROBE_TOLERANCE if setting.exact else max(HALF_GAP, size_of(setting, found))


def probe_sequences(policy: PreTrainedModel, prompts: Sequence[Prompt] = ()) -> list[list[int]]:
    """Tokens of the first prompts; without prompts, tokens spread over the vocabulary.

    The same on every rank. Every matrix takes part in every token's log-prob, but of the input
    embedding only the rows that are named do.
    """
    rendered = [list(prompt.token_ids) for prompt in prompts[:SEQUENCES]]
    shared = os.path.commonprefix(rendered)  # what the template begins every prompt with
    start = max(0, len(shared) - 1) if len(rendered) > 1 else 0
    found = [ids[start : start + LENGTH] for ids in rendered if len(ids) - start >= 2]
    if found:
        return found
    size = vocabulary_size(policy.get_output_embeddings())
    draw = np.random.Generator(np.random.Philox(key=0))
    tokens: list[list[int]] = draw.integers(0, size, (SEQUENCES, LENGTH)).tolist()
    return tokens


def probe(
    module: Trainee,
    engine: Engine,
    prompts: Sequence[Prompt],
    setting: Setting,
    autocast: bool = True,
) -> Probe:
    """Engine against trainer on the probe's tokens; collective where weights are sharded.

    The engine is awake and holds the trainer's weights.

    Args:
        prompts: the run's, whose tokens are the probe's.
        setting, autocast: see `setting_of`.
    """
    sequences = probe_sequences(module.policy, prompts)
    theirs = engine.score(sequences)
    in_training = module.in_training if autocast else nullcontext
    with in_training():
        ours = sequence_logprobs(module.policy, sequences, module.device)
    gap = residual(torch.cat(ours), torch.cat(theirs))
    if gap <= EXACT:
        return Probe(gap, PROBE_TOLERANCE)
    rows = [
        BatchRow(ids[:1], torch.tensor(ids[1:]), {"sampler_logprobs": scores})
        for ids, scores in zip(sequences, theirs, strict=True)
    ]
    found = suspects(module.policy, rows, 1.0, setting, in_training)
    held = engine.checksum()
    dtype = getattr(torch, engine.dtype)
    same = held is not None and held == weights_checksum(module.named_weights(), dtype)
    return Probe(gap, tolerance(setting, found), found, same)
