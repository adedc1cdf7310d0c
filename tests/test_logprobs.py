import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlzoo.bench._live import Live
from rlzoo.models import logprobs
from rlzoo.models.gradnorms import head_gradient_norms
from rlzoo.models.logits import PLAIN, LogitTransform
from rlzoo.models.logprobs import response_scores, token_scores
from rlzoo.models.tiles import TILE_ELEMENTS
from rlzoo.types import collate
from tests.recorded import recorded_rollouts


def test_scores_are_those_of_a_plain_forward_pass(tiny_model):
    rollouts = recorded_rollouts()
    batch = collate(rollouts.rows([2, 5]), 1)
    scores = response_scores(tiny_model, batch, temperature=0.7)
    for row, index in enumerate((2, 5)):
        prompt = rollouts.prompts[int(rollouts.group_ids[index])].token_ids
        response = rollouts.responses[index]
        ids = torch.tensor([[*prompt, *response.tolist()]])
        logits = tiny_model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1)
        taken = expected.gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(scores.logprobs[row, : len(response)], taken)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(scores.entropy[row, : len(response)], entropy)
        assert not scores.logprobs[row, len(response) :].any()


def plain_scores(hidden, head, tokens, temperature, entropy_gradient, transform):
    """The same from whole logits, its gradients by autograd."""
    logits = transform(head(hidden).float()) / temperature
    log_norm = logits.logsumexp(-1)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - log_norm
    with torch.set_grad_enabled(entropy_gradient):
        all_logprobs = logits - log_norm[:, None]
        return logprobs, -(all_logprobs.exp() * all_logprobs).sum(-1)


@pytest.mark.parametrize("elements", [2**21, 120])  # one tile, then 9 tokens by 12 places
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(0.5), LogitTransform(0.5, 3.0)])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("frozen, kept", [(False, 0), (False, 1000), (True, 1000)])
def test_tiles_change_neither_scores_nor_gradients(
    elements, temperature, entropy_gradient, transform, precision, frozen, kept, monkeypatch
):
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", kept)
    draw = torch.Generator().manual_seed(3)
    head = torch.nn.Linear(8, 40, bias=precision != "bfloat16")
    head.weight.data = torch.randn(40, 8, generator=draw)
    head.to(torch.bfloat16 if precision == "bfloat16" else torch.float32).requires_grad_(not frozen)
    hidden = torch.randn(25, 8, generator=draw).to(head.weight.dtype).requires_grad_()
    tokens, pull = torch.randint(40, (25,), generator=draw), torch.randn(2, 25, generator=draw)
    results, wanted = [], [hidden] if frozen else [hidden, *head.parameters()]
    for scores_of in (plain_scores, token_scores):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            scores = scores_of(hidden, head, tokens, temperature, entropy_gradient, transform)
        loss = sum(p @ s for p, s in zip(pull, scores, strict=True) if s.requires_grad)
        results.append([*scores, *torch.autograd.grad(loss, wanted)])
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        assert found.dtype == expected.dtype
        rounding = 1e-5 if i < 2 or precision == "float32" else 2e-2  # logits are rounded alike
        assert (found - expected).norm() <= rounding * expected.norm()


def test_neither_logits_nor_their_gradient_stand_whole(monkeypatch):
    """Where they are more than may be kept: [tokens, V] would be ten times the head's gradient."""
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", 100 * 50_000 - 1)
    head, hidden = torch.nn.Linear(8, 50_000), torch.randn(100, 8, requires_grad=True)
    tokens = torch.randint(50_000, (100,))
    with Live() as live:
        scores = token_scores(hidden, head, tokens, 0.9, entropy_gradient=True)
        (scores.logprobs.sum() + scores.entropy.sum()).backward()
    tile, gradient = 4 * TILE_ELEMENTS["cpu"], 4 * head.weight.numel()
    assert live.largest <= tile < 4 * 100 * 50_000
    assert live.peak <= 4 * tile + 2 * gradient
    with Live() as live:
        head_gradient_norms([hidden.detach()], head.weight, [tokens], 0.9, head.bias)
    assert live.largest <= tile and live.peak <= 4 * tile


@pytest.mark.parametrize(
    "frozen, kept, products", [(True, 0, 2), (False, 999, 4), (False, 1000, 3)]
)
def test_logits_are_made_again_for_the_heads_gradient_alone(frozen, kept, products, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", kept)
    head, hidden = torch.nn.Linear(8, 40, bias=False), torch.randn(25, 8, requires_grad=True)
    head.requires_grad_(not frozen)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        token_scores(hidden, head, torch.arange(25), 1.0).logprobs.sum().backward()
    assert counter.get_total_flops() == products * 2 * 25 * 8 * 40


def test_a_frozen_head_costs_no_gradient_of_its_own():
    """Under LoRA."""
    head, hidden = torch.nn.Linear(64, 200_000).requires_grad_(False), torch.randn(3, 64)
    with Live() as live:
        scores = token_scores(hidden.requires_grad_(), head, torch.arange(3), 1.0)
        scores.logprobs.sum().backward()
    assert head.weight.grad is None and hidden.grad.any()
    assert not scores.entropy.requires_grad
    assert live.peak < 4 * head.weight.numel() / 2


def test_the_heads_hooks_run_around_both_passes():
    """Where ZeRO-3 gathers its weight; once a pass, however many tiles there are."""
    head, hidden, calls = torch.nn.Linear(8, 40), torch.randn(25, 8, requires_grad=True), []
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.register_forward_hook(lambda *_: calls.append("after"))
    head.register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    token_scores(hidden, head, torch.arange(25), 1.0).logprobs.sum().backward()
    assert calls == ["before", "after", "backward"]
    assert "forward" not in vars(head)


def test_scores_are_float32_whatever_the_policy_is(tiny_model):
    batch = collate(recorded_rollouts().rows([0]), 1)
    scores = response_scores(tiny_model.bfloat16(), batch, 1.0)
    assert scores.logprobs.dtype == torch.float32
