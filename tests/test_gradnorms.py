import pytest
import torch

from rlzoo.callbacks.gvm import gradient_norms
from rlzoo.models.gradnorms import head_gradient_norms
from rlzoo.models.logprobs import response_scores
from rlzoo.models.tiles import TILE_ELEMENTS
from rlzoo.types import collate
from tests.conftest import make_tiny_model
from tests.recorded import recorded_rollouts


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 40])  # the Gram form up to 32, then the matrix
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_closed_form_equals_autograd(num_tokens, temperature):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    tokens = torch.randint(50, (num_tokens,), generator=generator)
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    logprobs[torch.arange(num_tokens), tokens].sum().backward()
    (norm,) = head_gradient_norms([hidden], weight.detach(), [tokens], temperature)
    assert norm.item() == pytest.approx(weight.grad.norm().item(), rel=1e-5)


def test_a_policy_that_is_sure_of_its_tokens_has_an_exact_norm_too():
    """As a difference of float32 numbers, most 1 - p would be 0 here."""
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(6, 16, generator=draw), torch.randn(50, 16, generator=draw)
    tokens = torch.randperm(50, generator=draw)[:6]
    weight[tokens] += 40 * torch.linalg.pinv(hidden).T  # raises the tokens' own logits by 40
    whole = weight.double().requires_grad_()
    logprobs = (hidden.double() @ whole.T).log_softmax(-1)[torch.arange(6), tokens]
    assert 0 < -logprobs.min() < 1e-7
    logprobs.sum().backward()
    (norm,) = head_gradient_norms([hidden], weight, [tokens], 1.0)
    assert norm.item() == pytest.approx(whole.grad.norm().item(), rel=1e-3)


def test_norms_do_not_depend_on_tiles_or_on_other_responses(monkeypatch):
    draw = torch.Generator().manual_seed(2)
    hidden = [torch.randn(n, 16, generator=draw) for n in (5, 0, 31, 90, 3)]
    tokens = [torch.randint(50, (len(h),), generator=draw) for h in hidden]
    weight = torch.randn(50, 16, generator=draw)
    alone = [
        head_gradient_norms([h], weight, [t], 0.8) for h, t in zip(hidden, tokens, strict=True)
    ]
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 400)
    monkeypatch.setattr("rlzoo.models.gradnorms.GRAM_ROWS", 7)
    together = head_gradient_norms(hidden, weight, tokens, 0.8)
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_rank_that_was_given_no_rollout_has_a_blank_one_of_norm_0():
    (nothing,) = head_gradient_norms(
        [torch.zeros(0, 4)], torch.ones(9, 4), [torch.zeros(0).long()], 1.0
    )
    assert nothing.item() == 0


@pytest.mark.parametrize("max_tokens", [10_000, 30])
def test_norms_of_rollouts_equal_autograd_through_the_policy(max_tokens):
    policy, rollouts = make_tiny_model(), recorded_rollouts(longest=40)
    chosen = [1, 3, 4, 7]
    norms = gradient_norms(policy, rollouts, chosen, temperature=0.8, max_tokens=max_tokens)
    for index, norm in zip(chosen, norms, strict=True):
        batch = collate(rollouts.rows([index]), 1)
        policy.zero_grad()
        response_scores(policy, batch, 0.8).logprobs.sum().backward()
        assert norm.item() == pytest.approx(policy.lm_head.weight.grad.norm().item(), rel=1e-5)


def test_a_row_without_tokens_has_norm_0_and_changes_no_other():
    """Such a row is what a rank without responses has."""
    hidden, weight, tokens = torch.randn(5, 16), torch.randn(50, 16), torch.arange(5)
    blank = torch.zeros(0, 16), torch.zeros(0, dtype=torch.long)
    norms = head_gradient_norms([hidden, blank[0]], weight, [tokens, blank[1]], 1.0)
    assert norms.tolist() == [float(head_gradient_norms([hidden], weight, [tokens], 1.0)), 0.0]
    assert head_gradient_norms([blank[0]], weight, [blank[1]], 1.0).tolist() == [0.0]
