"""Experiments that tell causes of a gap apart: the same tokens are scored under each suspicion.

A suspicion that the engine's log-probs bear out leaves no more than rounding between the two. Each
experiment is a forward pass over a few hundred tokens; collective where weights are sharded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn

from rlzoo.diagnosis.causes import EXACT, Probe, Setting, Suspect
from rlzoo.engines.base import Engine, SamplingParams, weights_checksum
from rlzoo.engines.probe import (
    PROBE_TOLERANCE,
    as_rollouts,
    probe_sequences,
    tolerance,
    trainer_scores,
)
from rlzoo.engines.transformers import truncated
from rlzoo.learning.microbatching import Plan, collate
from rlzoo.models.gather import through
from rlzoo.models.logits import transform_of
from rlzoo.models.logprobs import response_hidden
from rlzoo.models.lora import adapters_off, lora_of
from rlzoo.types import Prompt, RolloutBatch, Rollouts

ROLLOUTS, TOKENS = 8, 32  # compared: so many rollouts, so many tokens of each
FITTED = 64  # tokens that a fit looks at
GRID = 33  # values tried before a fit is narrowed down
NARROWINGS = 40  # steps of golden section


class Sample(NamedTuple):
    """A few tokens with what the engine said of them."""

    rollouts: Rollouts
    theirs: Tensor  # [M] log-probs of the engine, nats


def sample_of(rollouts: Rollouts) -> Sample:
    """The first tokens of the first rollouts, of different prompts where there are enough."""
    groups = rollouts.group_ids.tolist()
    firsts = {group: i for i, group in reversed(list(enumerate(groups)))}
    order = [*sorted(firsts.values()), *sorted(set(range(len(groups))) - set(firsts.values()))]
    kept = [i for i in order if len(rollouts.responses[i])][:ROLLOUTS]
    cut = dataclasses.replace(
        rollouts,
        prompts=[rollouts.prompts[groups[i]] for i in kept],
        group_ids=torch.arange(len(kept)),
        responses=[rollouts.responses[i][:TOKENS] for i in kept],
        sampler_logprobs=[rollouts.sampler_logprobs[i][:TOKENS] for i in kept],
        scores={},
    )
    theirs = torch.cat([torch.zeros(0), *cut.sampler_logprobs])
    return Sample(cut, theirs)


@torch.no_grad()
def suspects(
    policy: nn.Module,
    rollouts: Rollouts,
    temperature: float,
    setting: Setting,
    in_training: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Suspect]:
    """What is left of the gap under each suspicion; empty where there is no token.

    Args:
        temperature: that the trainer's log-probs are taken at.
        in_training: makes the context of the trainer's passes (`precision_plugin.forward_context`).
    """
    sample = sample_of(rollouts)
    if not len(sample.theirs):
        return []
    with in_training():
        logits = logits_of(policy, sample.rollouts)
    tokens = torch.cat(sample.rollouts.responses).to(logits.device)
    ours = at_temperature(logits, tokens, temperature)
    found = [Suspect("none", residual(ours, sample.theirs))]
    found += of_the_trainer(policy, sample, tokens, temperature, in_training)
    found += of_number_formats(policy, sample, tokens, temperature, setting)
    found += of_sampling(logits, tokens, sample.theirs, temperature, setting)
    found += of_places(ours, sample)
    found += of_prompts(policy, sample, tokens, temperature, setting, in_training)
    return found


def residual(ours: Tensor, theirs: Tensor) -> float:
    """Mean |ours - theirs|, nats; inf where it is no number, so that it explains nothing."""
    mean = float((ours.double() - theirs.to(ours).double()).abs().mean())
    return mean if math.isfinite(mean) else math.inf


# --- before the first draw ----------------------------------------------------------------------


def setting_of(
    module: LightningModule,
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


def probe(
    module: LightningModule,
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
    rollouts = as_rollouts(sequences, engine.score(sequences))
    in_training = module.trainer.precision_plugin.forward_context if autocast else nullcontext
    with in_training():
        ours = trainer_scores(module.policy, sequences, module.device)
    gap = residual(torch.cat(ours), torch.cat(rollouts.sampler_logprobs))
    if gap <= EXACT:
        return Probe(gap, PROBE_TOLERANCE)
    found = suspects(module.policy, rollouts, 1.0, setting, in_training)
    held = engine.checksum()
    dtype = getattr(torch, engine.dtype)
    same = held is not None and held == weights_checksum(module.named_weights(), dtype)
    return Probe(gap, tolerance(setting, found), found, same)


# --- one experiment each ----------------------------------------------------------------------


def of_the_trainer(
    policy: nn.Module,
    sample: Sample,
    tokens: Tensor,
    temperature: float,
    in_training: Callable[[], AbstractContextManager[None]],
) -> Iterator[Suspect]:
    """Dropout, which is off in evaluation; adapters that the engine has not."""
    if policy.training:
        with in_training(), evaluating(policy):
            calm = at_temperature(logits_of(policy, sample.rollouts), tokens, temperature)
        yield Suspect("dropout", residual(calm, sample.theirs))
    if lora_of(policy) is not None:
        with in_training(), adapters_off(policy):
            bare = at_temperature(logits_of(policy, sample.rollouts), tokens, temperature)
        yield Suspect("adapters", residual(bare, sample.theirs))


def of_number_formats(
    policy: nn.Module, sample: Sample, tokens: Tensor, temperature: float, setting: Setting
) -> Iterator[Suspect]:
    """The trainer's passes in float32, and how much half precision alone moves a log-prob here."""
    if setting.exact or setting.weights != "float32":
        return  # of coarser weights nothing finer can be computed
    with torch.autocast(tokens_device(policy).type, enabled=False):
        exact = at_temperature(logits_of(policy, sample.rollouts), tokens, temperature)
    yield Suspect("precision", residual(exact, sample.theirs))
    for dtype in {setting.trainer, setting.engine} & {"bfloat16", "float16"}:
        with torch.autocast(tokens_device(policy).type, dtype=getattr(torch, dtype)):
            half = at_temperature(logits_of(policy, sample.rollouts), tokens, temperature)
        yield Suspect("rounding", residual(half, exact), dtype)


def of_sampling(
    logits: Tensor, tokens: Tensor, theirs: Tensor, temperature: float, setting: Setting
) -> Iterator[Suspect]:
    """Another temperature or cap of the logits, top-p, top-k: the value that fits best."""

    def left(raw: Tensor, at: float, some: slice = slice(None)) -> float:
        return residual(at_temperature(raw, tokens[some], at), theirs[some])

    few = slice(None, None, -(-len(tokens) // FITTED))
    value = fit(lambda t: left(logits[few], t, few), 0.1, 10.0)
    yield Suspect("temperature", left(logits, value), f"{value:.3g}")
    capped = lambda raw, c: (raw / c).tanh() * c  # noqa: E731
    value = fit(lambda c: left(capped(logits[few], c), temperature, few), 1.0, 200.0)
    yield Suspect("cap", left(capped(logits, value), temperature), f"{value:.3g}")
    theirs = theirs.to(logits)
    lift = theirs - at_temperature(logits, tokens, temperature)  # -log of a mass that is kept
    most = int(lift.argmax())
    mass = math.exp(-max(0.0, float(lift[most])))
    ordered = (logits[most] / temperature).softmax(-1).sort(descending=True).values
    k = int((ordered.cumsum(-1) < mass - 1e-5).sum()) + 1
    for name, params in (
        ("top_p", SamplingParams(temperature, 1, top_p=min(1.0, mass * (1 - 1e-4)))),
        ("top_k", SamplingParams(temperature, 1, top_k=k)),
    ):
        kept = truncated(logits / temperature, params).log_softmax(-1)
        kept = kept.gather(1, tokens[:, None])[:, 0]
        near = "" if setting.exact or name == "top_p" else " or so"  # rounding moves the k-th
        yield Suspect(name, residual(kept, theirs), f"{getattr(params, name):.3g}{near}")
    # What is kept holds all that is likelier than the token, so that its mass is at least theirs.
    probs = (logits / temperature).softmax(-1)
    likelier = probs.where(probs >= probs.gather(1, tokens[:, None]), 0.0).sum(-1)
    slack = EXACT if setting.exact else 2 * setting.size
    if bool(((lift > -slack) & ((-lift).exp() > likelier - slack)).all()):
        yield Suspect("left_out", math.inf)


def of_places(ours: Tensor, sample: Sample) -> Iterator[Suspect]:
    """Log-probs that stand one token too early or too late."""
    lengths = [len(response) for response in sample.rollouts.responses]
    rows = list(zip(ours.split(lengths), sample.theirs.split(lengths), strict=True))
    if sum(max(0, length - 1) for length in lengths) < 8:
        return
    for name, ours_cut, theirs_cut in (
        ("late", slice(None, -1), slice(1, None)),
        ("early", slice(1, None), slice(None, -1)),
    ):
        moved = torch.cat([row[ours_cut] for row, _ in rows])
        beside = torch.cat([row[theirs_cut] for _, row in rows])
        yield Suspect("shift", residual(moved, beside), name)


def of_prompts(
    policy: nn.Module,
    sample: Sample,
    tokens: Tensor,
    temperature: float,
    setting: Setting,
    in_training: Callable[[], AbstractContextManager[None]],
) -> Iterator[Suspect]:
    """Prompts with one token more or less than the trainer's."""
    bos = () if setting.bos is None else (setting.bos,)
    changes = {
        "without its first token": lambda ids: ids[1:],
        "without its last token": lambda ids: ids[:-1],
        "with a begin token before it": lambda ids: (*bos, *ids),
        "with its first token twice": lambda ids: (*ids[:1], *ids),
    }
    if any(len(prompt.token_ids) < 2 for prompt in sample.rollouts.prompts):
        return
    for name, change in changes.items():
        prompts = [with_tokens(p, change(p.token_ids)) for p in sample.rollouts.prompts]
        changed = dataclasses.replace(sample.rollouts, prompts=prompts)
        with in_training():
            found = at_temperature(logits_of(policy, changed), tokens, temperature)
        yield Suspect("prompt", residual(found, sample.theirs), name)


# --- passes -------------------------------------------------------------------------------------


def with_tokens(prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
    return dataclasses.replace(prompt, token_ids=tuple(token_ids))


def tokens_device(policy: nn.Module) -> torch.device:
    return next(policy.parameters()).device


def logits_of(policy: nn.Module, rollouts: Rollouts) -> Tensor:
    """[M, V] float32 of the model as it is, before any temperature."""
    count = len(rollouts)
    plan = Plan(list(range(count)), torch.ones(count), 1.0)
    batch = collate(rollouts, plan, pad_token_id=0).to(tokens_device(policy))
    return through(policy, response_logits, policy, batch)


def response_logits(policy: nn.Module, batch: RolloutBatch) -> Tensor:
    hidden = response_hidden(policy, batch)
    return transform_of(policy)(policy.get_output_embeddings()(hidden).float())


def at_temperature(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """[M] log-probs of tokens, nats."""
    return (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Within it, every module is in evaluation; after it as it was."""
    modes = {module: module.training for module in policy.modules()}
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def fit(loss: Callable[[float], float], low: float, high: float) -> float:
    """The value in [low, high] of the least loss: a grid, then golden section around its best."""
    values = torch.logspace(math.log10(low), math.log10(high), GRID).tolist()
    best = min(range(GRID), key=lambda i: loss(values[i]))
    a, b = values[max(0, best - 1)], values[min(GRID - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(NARROWINGS):
        x, y = b - golden * (b - a), a + golden * (b - a)
        a, b = (a, y) if loss(x) <= loss(y) else (x, b)
    return (a + b) / 2
