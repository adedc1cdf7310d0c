"""Each cause that the doctor names, planted; and it says unknown rather than a wrong one.

The shipped policy and an engine of its own, with one thing wrong between them, draw, score and are
compared as in a run's first rollout step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rlzoo.data.arithmetic import ArithmeticPrompts
from rlzoo.data.templates import PromptTemplate
from rlzoo.diagnosis.causes import Evidence, gap_figures, verdict
from rlzoo.diagnosis.probe import probe, setting_of
from rlzoo.diagnosis.suspects import logits_of, sample_of, suspects
from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.models.lora import add_lora, whole_weights_of
from rlzoo.models.policy import load_policy, load_tokenizer
from rlzoo.types import Prompt, Rollouts

LIMIT = 24  # tokens of a response
SAMPLED = SamplingParams(1.0, LIMIT)
TOKENIZER = load_tokenizer("tiny")


@functools.cache
def prompts() -> list[Prompt]:
    source = ArithmeticPrompts(num_train=8, num_val=1, num_test=1, template=PromptTemplate())
    return source.template.encode(source.load("train"), TOKENIZER, 128)


class Planted(TransformersEngine):
    """An engine with something wrong between it and the trainer."""

    def __init__(self, policy: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        make = lambda: load_policy("tiny").to(dtype)  # noqa: E731
        super().__init__(make, [TOKENIZER.eos_token_id], TOKENIZER.pad_token_id)
        self.load_weights(whole_weights_of(policy), 0)
        self.other_prompt: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda ids: ids
        self.reported: Callable[[Tensor], Tensor] = lambda logprobs: logprobs

    def draw(self, params: SamplingParams) -> Rollouts:
        asked = [
            Request(self.other_prompt(p.token_ids), (i, i + 99)) for i, p in enumerate(prompts())
        ]
        drawn = [r for group in self.generate(asked, params, 0) for r in group]
        count = len(drawn)
        return Rollouts(
            prompts=prompts(),
            group_ids=torch.arange(len(prompts())).repeat_interleave(2),
            responses=[r.token_ids for r in drawn],
            sampler_logprobs=[self.reported(r.logprobs.clone()) for r in drawn],
            truncated=torch.zeros(count, dtype=torch.bool),
            rewards=torch.zeros(count),
            verdicts=torch.zeros(count, dtype=torch.int8),
            policy_version=0,
            rollout_step=0,
        )


def diagnosed(
    policy: nn.Module,
    engine: Planted,
    sampled: SamplingParams = SAMPLED,
    temperature: float = 1.0,
    precision: str = "32-true",
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
    bos: int | None = None,
    asked: SamplingParams | None = None,
) -> str:
    """The doctor's line.

    Args:
        sampled: what the engine samples by.
        temperature: of the trainer's log-probs.
        precision, context: Lightning's name, and what it means.
        bos: the tokenizer's begin token.
        asked: what the run's own datamodule asks of its engine.
    """
    module = SimpleNamespace(
        policy=policy,
        device=torch.device("cpu"),
        trainer=SimpleNamespace(precision=precision),
        in_training=context,
        named_weights=lambda: whole_weights_of(policy),
    )
    setting = setting_of(module, engine, asked, bos)
    evidence = Evidence(setting, probe(module, engine, prompts(), setting))
    rollouts = engine.draw(sampled)
    with torch.no_grad(), context():
        logits = logits_of(policy, rollouts.rows())
    ours = (logits / temperature).log_softmax(-1)
    ours = ours.gather(1, torch.cat(rollouts.responses)[:, None])[:, 0]
    ours = ours.split(rollouts.lengths.tolist())
    gaps = [(a - b).abs() for a, b in zip(ours, rollouts.sampler_logprobs, strict=True)]
    found = suspects(policy, sample_of(rollouts), temperature, setting, context)
    cause = evidence.cause(gaps, found, temperature)
    return verdict(gap_figures(torch.cat(gaps)), cause, 0.1)


def fresh(dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_policy("tiny").to(dtype).train()


@pytest.fixture(scope="module")
def policy() -> nn.Module:
    return fresh()


def half(dtype: torch.dtype) -> Callable[[], AbstractContextManager[None]]:
    return functools.partial(torch.autocast, "cpu", dtype=dtype)


def test_what_agrees_is_said_to_agree(policy):
    assert "Engine and trainer agree" in diagnosed(policy, Planted(policy))


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 0.95, 1.5])
def test_another_temperature_is_named_with_its_value(policy, temperature):
    told = diagnosed(policy, Planted(policy), SamplingParams(temperature, LIMIT))
    assert f"those of temperature {temperature}, the trainer's of 1." in told


def test_log_probs_from_before_the_temperature_are_named(policy):
    engine = Planted(policy)
    drawn = engine.draw(SamplingParams(0.7, LIMIT))
    with torch.no_grad():
        logprobs = logits_of(policy, drawn.rows()).log_softmax(-1)
    raw = logprobs.gather(1, torch.cat(drawn.responses)[:, None])[:, 0]
    drawn = dataclasses.replace(drawn, sampler_logprobs=list(raw.split(drawn.lengths.tolist())))
    engine.draw = lambda params: drawn
    told = diagnosed(policy, engine, temperature=0.7)
    assert "those of temperature 1, the trainer's of 0.7" in told


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (SamplingParams(1.0, LIMIT, top_p=0.8), "those of top_p=0.8"),
        (SamplingParams(1.0, LIMIT, top_k=2), "those of top_k=2"),
        (SamplingParams(0.8, LIMIT, top_k=2), "sampling settings"),  # both at once: unknown
    ],
)
def test_tokens_that_the_engine_leaves_out_are_named(policy, params, words):
    told = diagnosed(policy, Planted(policy), params)
    assert words in told and "weight sync" not in told


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_tokens_that_the_run_itself_leaves_out_are_named_by_its_keys(policy, precision):
    params, context = SamplingParams(0.8, LIMIT, top_k=2), half(torch.bfloat16)
    context = nullcontext if precision == "32-true" else context
    told = diagnosed(policy, Planted(policy), params, 0.8, precision, context, asked=params)
    assert "datamodule.top_k=2 leaves tokens out, as was allowed" in told


# --- number formats -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_a_trainer_in_half_precision_is_named_with_both_formats(policy, precision, dtype):
    engine = Planted(policy)
    told = diagnosed(policy, engine, precision=precision, context=half(dtype))
    if dtype == torch.bfloat16:
        assert "the trainer computes in bfloat16, the engine in float32" in told
        assert "where the trainer computes in float32 too, they agree" in told
    assert "sampling" not in told and "weight" not in told


@pytest.mark.parametrize(
    ("trainer", "engine"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_weights_in_half_precision_on_one_side_are_named(trainer, engine):
    mine = fresh(trainer)
    told = diagnosed(mine, Planted(mine, engine), precision="32-true")
    named = [str(dtype).removeprefix("torch.") for dtype in (trainer, engine)]
    assert f"precision: the trainer computes in {named[0]}, the engine in {named[1]}" in told


def test_a_temperature_is_named_under_half_precision_too(policy):
    told = diagnosed(
        policy,
        Planted(policy),
        SamplingParams(1.5, LIMIT),
        precision="bf16-mixed",
        context=half(torch.bfloat16),
    )
    assert "those of temperature 1.5" in told


def test_a_quantised_cache_is_named_before_anything_else(policy):
    engine = Planted(policy)
    engine.kv_cache_dtype = "fp8"
    torch.manual_seed(0)
    engine.reported = lambda x: x + 0.02 * torch.randn_like(x)
    assert (
        "precision: the trainer computes in float32, the engine in float32 with a cache of fp8"
        in (diagnosed(policy, engine))
    )


# --- weights and what is computed from them -----------------------------------------------------


def spoilt(policy: nn.Module, part: str) -> Planted:
    """An engine with noise in the weights whose name has `part`."""
    engine = Planted(policy)
    torch.manual_seed(0)
    head = engine.model.lm_head
    if part == "lm_head":  # tied to the input embedding, which stays
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    for name, weight in engine.model.named_parameters():
        if part in name and weight.dim() > 1:
            weight.add_(0.3 * weight.std() * torch.randn_like(weight))
    return engine


@pytest.mark.parametrize("part", ["", "layers.1.", "lm_head"])
def test_stale_weights_are_named_whichever_they_are(policy, part):
    told = diagnosed(policy, spoilt(policy, part))
    assert "the weights: a weight sync left some of them as they were" in told


def test_adapters_that_are_not_merged_are_named():
    mine = fresh()
    add_lora(mine, {"r": 4, "alpha": 8})
    torch.manual_seed(0)
    for name, weight in mine.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, 0, 0.02)
    engine = Planted(mine)
    assert "agree" in diagnosed(mine, engine)
    engine.load_weights(load_policy("tiny").named_parameters(), 0)
    assert "the adapters: model.lora is not merged" in diagnosed(mine, engine)


def test_dropout_is_named_and_no_weight_sync():
    mine = fresh()
    for layer in mine.model.layers:
        layer.self_attn.attention_dropout = 0.1
    torch.manual_seed(0)
    told = diagnosed(mine, Planted(mine))
    assert "dropout: it is on while the trainer scores" in told
    assert "weight sync" not in told and "tis_cap" not in told
    assert mine.training  # as it was


@pytest.mark.parametrize(
    ("side", "change", "words"),
    [
        ("engine", {"logit_scale": 0.8}, "the engine's are the trainer's divided by 1.25"),
        ("trainer", {"logit_scale": 0.8}, "the engine's are the trainer's divided by 0.8"),
        ("engine", {"final_logit_softcapping": 8.0}, "the engine caps them at 8"),
        (
            "trainer",
            {"final_logit_softcapping": 8.0},
            "the forward pass: engine and trainer hold equal",
        ),
    ],
)
def test_logits_that_one_side_scales_or_caps_are_named(side, change, words):
    mine = fresh()
    engine = Planted(mine)
    model = engine.model if side == "engine" else mine
    model.config.update(change)
    told = diagnosed(mine, engine)
    assert words in told and "weight sync" not in told


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "word"), [(1, "late"), (-1, "early")])
def test_log_probs_of_the_token_beside_are_named(policy, by, word):
    engine = Planted(policy)
    engine.reported = lambda logprobs: logprobs.roll(by)
    assert f"a shift: the engine's log-probs stand one token too {word}" in diagnosed(
        policy, engine
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids[1:], "the engine saw it without its first token"),
        (lambda ids: ids[:-1], "the engine saw it without its last token"),
        (lambda ids: (5, *ids), "the engine saw it with a begin token before it"),
        (lambda ids: (*ids[:2], *ids[5:], 7), "unknown"),  # another template
    ],
)
def test_other_tokens_of_the_prompt_are_named_or_nothing_is(policy, change, words):
    engine = Planted(policy)
    engine.other_prompt = change
    told = diagnosed(policy, engine, bos=5)
    assert words in told and "prompt" in told and "weight sync" not in told


def test_an_end_that_was_not_sampled_is_named(policy):
    engine = Planted(policy)
    engine.reported = lambda logprobs: torch.cat([logprobs[:-1], logprobs[-1:] - 3])
    assert "how a response ends" in diagnosed(policy, engine)


def test_what_nothing_bears_out_is_unknown(policy):
    engine = Planted(policy)
    torch.manual_seed(0)
    engine.reported = lambda logprobs: logprobs + 0.1 * torch.randn_like(logprobs)
    told = diagnosed(policy, engine)
    assert "Likely cause: unknown" in told and "on a probe the weights agree" in told


def test_a_log_prob_that_is_no_number_never_agrees(policy):
    engine = Planted(policy)
    last = lambda x: torch.arange(len(x)) == len(x) - 1  # noqa: E731
    engine.reported = lambda x: x.where(~last(x), torch.nan)
    told = diagnosed(policy, engine)
    assert "agree" not in told and "16 log-probs are not finite" in told
