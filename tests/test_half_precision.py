"""What training computes in bfloat16 is what float32 on a CPU computes, but for its rounding: on
the shipped policy, on responses that it drew. Figures go into pytest's report."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlzoo.callbacks.gvm import gradient_norms
from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.models.logprobs import response_scores
from rlzoo.models.policy import load_policy, load_tokenizer
from rlzoo.types import Prompt, Rollouts, collate
from tests.devices import on_each_device

TEMPERATURE = 0.9
COUNT, GROUP = 64, 8  # responses in all, of a prompt
SUMS = [f"What is {a} + {b}?" for a, b in ((3, 4), (12, 34), (90, 21), (5, 77))]
PRODUCTS = [f"What is {a} * {b}?" for a, b in ((3, 4), (12, 4), (9, 21), (5, 7))]


@pytest.fixture(scope="module")
def policies() -> dict[str, PreTrainedModel]:
    """By attention: one row of real tokens, and padded rows."""
    return {name: load_policy("tiny", attention=name) for name in ("packed", "sdpa")}


@pytest.fixture(scope="module")
def policy(policies) -> PreTrainedModel:
    return policies["sdpa"]


@pytest.fixture(scope="module")
def rollouts(policy) -> Rollouts:
    tokenizer = load_tokenizer("tiny")
    prompts = [
        Prompt(
            question,
            question,
            "0",
            token_ids=tuple(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
            ),
        )
        for question in SUMS + PRODUCTS
    ]
    engine = TransformersEngine(lambda: copy.deepcopy(policy), [0], 1, device="cpu")
    engine.load_weights(policy.named_parameters(), 0)
    requests = [Request(p.token_ids, tuple(range(9 * i, 9 * i + 8))) for i, p in enumerate(prompts)]
    drawn = engine.generate(requests, SamplingParams(TEMPERATURE, 64), 0)
    responses = [response for group in drawn for response in group]
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(len(prompts)).repeat_interleave(GROUP),
        responses=[response.token_ids for response in responses],
        sampler_logprobs=[response.logprobs for response in responses],
        truncated=torch.zeros(COUNT, dtype=torch.bool),
        rewards=torch.zeros(COUNT),
        verdicts=torch.zeros(COUNT, dtype=torch.int8),
        policy_version=0,
        rollout_step=0,
    )


def scored(policy: PreTrainedModel, rollouts: Rollouts, device: str, half: bool) -> list[Tensor]:
    """[B, T] log-probs, and the gradient of their weighted sum, all in one vector; on the CPU."""
    policy = copy.deepcopy(policy).to(device)
    batch = collate(rollouts.rows()).to(device)
    weights = torch.linspace(-1, 1, COUNT, device=device)[:, None]  # of both signs, as advantages
    with torch.autocast(device, torch.bfloat16, enabled=half):
        logprobs = response_scores(policy, batch, TEMPERATURE).logprobs
    (weights * logprobs).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return [logprobs.detach()[batch.response_mask].cpu(), gradient.double().cpu()]


@pytest.fixture(scope="module")
def exact(policy, rollouts) -> list[Tensor]:
    return scored(policy, rollouts, "cpu", half=False)


@on_each_device
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_log_probs_and_gradients_are_those_of_float32_on_a_cpu(
    device, half, attention, policies, rollouts, exact, record_property
):
    logprobs, gradient = scored(policies[attention], rollouts, device, half)
    gap = float((logprobs - exact[0]).abs().mean())
    cosine = float(torch.cosine_similarity(gradient, exact[1], dim=0))
    longer = float(gradient.norm() / exact[1].norm())
    kind = f"{attention}_{'bf16' if half else 'float32'}"
    for name, value in {"gap": gap, "gradient_cosine": cosine, "gradient_ratio": longer}.items():
        record_property(f"{kind}_{name}", value)
    assert gap < (0.02 if half else 1e-5)
    assert cosine > (0.999 if half else 0.999999)
    assert longer == pytest.approx(1, abs=0.02 if half else 1e-4)


@on_each_device
def test_gradient_norms_are_those_of_float32_on_a_cpu(device, policy, rollouts, record_property):
    def norms(where: str, half: bool) -> Tensor:
        moved = copy.deepcopy(policy).to(where)
        with torch.autocast(where, torch.bfloat16, enabled=half):
            return gradient_norms(
                moved, rollouts, list(range(COUNT)), temperature=TEMPERATURE, max_tokens=2048
            )

    exact = norms("cpu", half=False)
    off = float(((norms(device, half=True) - exact).abs() / exact).mean())
    record_property("norms_off", off)
    assert off < 0.02
