"""Experiments that tell causes of a gap apart: the same tokens are scored under each suspicion.

A suspicion that the engine's log-probs bear out leaves no more than rounding between the two. Each
experiment is a forward pass over a few hundred tokens; collective where weights are sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlzoo.diagnosis.causes import EXACT, Setting, Suspect
from rlzoo.engines.base import SamplingParams
from rlzoo.engines.drawing import truncated
from rlzoo.models.gather import through
from rlzoo.models.logits import transform_of
from rlzoo.models.logprobs import response_hidden
from rlzoo.models.lora import adapters_off, lora_of
from rlzoo.types import BatchRow, RolloutBatch, Rollouts, collate

ROLLOUTS, TOKENS = 8, 32  # compared: so many rollouts, so many tokens of each
FITTED = 64  # tokens that a fit looks at
GRID = 33  # values tried before a fit is narrowed down
NARROWINGS = 40  # steps of golden section


def sample_of(rollouts: Rollouts) -> list[BatchRow]:
    """The first tokens of the first rollouts, of different prompts where there are enough."""
    groups = rollouts.group_ids.tolist()
    firsts = {group: i for i, group in reversed(list(enumerate(groups)))}
    order = [*sorted(firsts.values()), *sorted(set(range(len(groups))) - set(firsts.values()))]
    kept = [i for i in order if len(rollouts.responses[i])][:ROLLOUTS]
    return [
        BatchRow(
            row.prompt_ids,
            row.response_ids[:TOKENS],
            {"sampler_logprobs": rollouts.sampler_logprobs[i][:TOKENS]},
        )
        for i, row in zip(kept, rollouts.rows(kept), strict=True)
    ]


@torch.no_grad()
def suspects(
    policy: PreTrainedModel,
    rows: Sequence[BatchRow],
    temperature: float,
    setting: Setting,
    in_training: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Suspect]:
    """What is left of the gap under each suspicion; empty where there is no token.

    Args:
        rows: a few tokens with the engine's log-probs, from `sample_of`.
        temperature: that the trainer's log-probs are taken at.
        in_training: makes the context of the trainer's passes (`precision_plugin.forward_context`).
    """
    if not rows:
        return []
    theirs = torch.cat([torch.as_tensor(row.tokens["sampler_logprobs"]) for row in rows])
    with in_training():
        logits = logits_of(policy, rows)
    tokens = torch.cat([row.response_ids for row in rows]).to(logits.device)

    def score(logits: Tensor) -> Tensor:
        return at_temperature(logits, tokens, temperature)

    ours = score(logits)
    found = [Suspect("none", residual(ours, theirs))]
    found += of_the_trainer(policy, rows, theirs, score, in_training)
    found += of_number_formats(policy, rows, theirs, score, setting)
    found += of_sampling(logits, tokens, theirs, temperature, setting)
    found += of_places(ours, theirs, [len(row.response_ids) for row in rows])
    found += of_prompts(policy, rows, theirs, score, setting, in_training)
    return found


def residual(ours: Tensor, theirs: Tensor) -> float:
    """Mean |ours - theirs|, nats; inf where it is no number, so that it explains nothing."""
    mean = float((ours.double() - theirs.to(ours).double()).abs().mean())
    return mean if math.isfinite(mean) else math.inf


# --- one experiment each ----------------------------------------------------------------------


def of_the_trainer(
    policy: PreTrainedModel,
    rows: Sequence[BatchRow],
    theirs: Tensor,
    score: Callable[[Tensor], Tensor],
    in_training: Callable[[], AbstractContextManager[None]],
) -> Iterator[Suspect]:
    """Dropout, which is off in evaluation; adapters that the engine has not."""
    if policy.training:
        with in_training(), evaluating(policy):
            calm = score(logits_of(policy, rows))
        yield Suspect("dropout", residual(calm, theirs))
    if lora_of(policy) is not None:
        with in_training(), adapters_off(policy):
            bare = score(logits_of(policy, rows))
        yield Suspect("adapters", residual(bare, theirs))


def of_number_formats(
    policy: PreTrainedModel,
    rows: Sequence[BatchRow],
    theirs: Tensor,
    score: Callable[[Tensor], Tensor],
    setting: Setting,
) -> Iterator[Suspect]:
    """The trainer's passes in float32, and how much half precision alone moves a log-prob here."""
    if setting.exact or setting.weights != "float32":
        return  # of coarser weights nothing finer can be computed
    with torch.autocast(device_of(policy).type, enabled=False):
        exact = score(logits_of(policy, rows))
    yield Suspect("precision", residual(exact, theirs))
    for dtype in {setting.trainer, setting.engine} & {"bfloat16", "float16"}:
        with torch.autocast(device_of(policy).type, dtype=getattr(torch, dtype)):
            half = score(logits_of(policy, rows))
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

    def capped(raw: Tensor, c: float) -> Tensor:
        return (raw / c).tanh() * c

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


def of_places(ours: Tensor, theirs: Tensor, lengths: list[int]) -> Iterator[Suspect]:
    """Log-probs that stand one token too early or too late.

    Args:
        lengths: tokens of each response, that `ours` and `theirs` hold one after the other.
    """
    rows = list(zip(torch.split(ours, lengths), torch.split(theirs, lengths), strict=True))
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
    policy: PreTrainedModel,
    rows: Sequence[BatchRow],
    theirs: Tensor,
    score: Callable[[Tensor], Tensor],
    setting: Setting,
    in_training: Callable[[], AbstractContextManager[None]],
) -> Iterator[Suspect]:
    """Prompts with one token more or less than the trainer's."""
    bos = () if setting.bos is None else (setting.bos,)
    changes: dict[str, Callable[[Sequence[int]], Sequence[int]]] = {
        "without its first token": lambda ids: ids[1:],
        "without its last token": lambda ids: ids[:-1],
        "with a begin token before it": lambda ids: (*bos, *ids),
        "with its first token twice": lambda ids: (*ids[:1], *ids),
    }
    if any(len(row.prompt_ids) < 2 for row in rows):
        return
    for name, change in changes.items():
        changed = [row._replace(prompt_ids=change(row.prompt_ids)) for row in rows]
        with in_training():
            found = score(logits_of(policy, changed))
        yield Suspect("prompt", residual(found, theirs), name)


# --- passes -------------------------------------------------------------------------------------


def device_of(policy: PreTrainedModel) -> torch.device:
    return next(policy.parameters()).device


def logits_of(policy: PreTrainedModel, rows: Sequence[BatchRow]) -> Tensor:
    """[M, V] float32 of the model as it is, before any temperature."""
    return through(policy, response_logits, policy, collate(rows).to(device_of(policy)))


def response_logits(policy: PreTrainedModel, batch: RolloutBatch) -> Tensor:
    hidden = response_hidden(policy, batch)
    return transform_of(policy)(policy.get_output_embeddings()(hidden).float())


def at_temperature(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """[M] log-probs of tokens, nats."""
    return (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@contextmanager
def evaluating(policy: PreTrainedModel) -> Iterator[None]:
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
    values: list[float] = torch.logspace(math.log10(low), math.log10(high), GRID).tolist()
    best = min(range(GRID), key=lambda i: loss(values[i]))
    a, b = values[max(0, best - 1)], values[min(GRID - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(NARROWINGS):
        x, y = b - golden * (b - a), a + golden * (b - a)
        a, b = (a, y) if loss(x) <= loss(y) else (x, b)
    return (a + b) / 2
