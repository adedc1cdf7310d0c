import math

import pytest
import torch
from torch import Tensor

from rlzoo.learning.losses import (
    clipped_surrogate_loss,
    kl_to_reference,
    policy_gradient_loss,
    sequence_clipped_surrogate_loss,
)


def loss_at(ratio: float, advantage: float, **options: float) -> float:
    one = torch.ones(1, 1, dtype=torch.float64)
    log_ratio = one * torch.tensor(ratio, dtype=torch.float64).log()
    return clipped_surrogate_loss(log_ratio, 0 * one, advantage * one, one, **options)[0].item()


@pytest.mark.parametrize(
    "ratio, expected", [(0.5, -0.5), (0.8, -0.8), (1, -1), (1.2, -1.2), (1.5, -1.2)]
)
def test_a_good_token_gains_nothing_beyond_the_upper_clip(ratio, expected):
    assert loss_at(ratio, 1.0, dual_clip=3.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "ratio, expected", [(0.5, 0.8), (0.8, 0.8), (1, 1), (1.2, 1.2), (2, 2), (5, 3)]
)
def test_a_bad_token_is_bounded_by_the_lower_and_the_dual_clip(ratio, expected):
    assert loss_at(ratio, -1.0, dual_clip=3.0) == pytest.approx(expected)


def test_without_dual_clip_a_bad_token_is_not_bounded_above():
    assert loss_at(5.0, -1.0) == pytest.approx(5.0)


@pytest.mark.parametrize(
    "d, expected", [(-1, 0.36788), (-0.1, 0.0048374), (0, 0), (0.1, 0.0051709), (1, 0.71828)]
)
def test_k3_has_its_known_values(d, expected):
    reference = torch.tensor([[float(d)]])
    value = kl_to_reference(torch.zeros(1, 1), reference, torch.ones(1, 1))
    assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def random_step(num_rollouts: int = 6, num_tokens: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_rollouts, num_tokens)
    normal = lambda: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        "logprobs": (normal() * 0.3 - 1).requires_grad_(),
        "old_logprobs": normal() * 0.3 - 1,
        "advantages": normal(),
        "weights": torch.rand(shape, generator=generator) * (normal() > -0.5),
    }


@pytest.mark.parametrize("split", [[6], [3, 3], [1, 5], [1, 1, 1, 1, 1, 1]])
def test_gradient_does_not_depend_on_the_split_into_microbatches(split):
    step = random_step()
    (expected,) = torch.autograd.grad(clipped_surrogate_loss(**step).loss_sum, step["logprobs"])
    parts = zip(*(x.split(split) for x in step.values()), strict=True)
    total = sum(clipped_surrogate_loss(*part).loss_sum for part in parts)
    (actual,) = torch.autograd.grad(total, step["logprobs"])
    torch.testing.assert_close(actual, expected)


def test_on_policy_gradient_is_reinforce():
    step = random_step()
    step["old_logprobs"] = step["logprobs"].detach()
    (grad,) = torch.autograd.grad(clipped_surrogate_loss(**step).loss_sum, step["logprobs"])
    torch.testing.assert_close(grad, -step["advantages"] * step["weights"])


def test_raft_and_raft_pp_have_the_same_gradient_at_ratio_one():
    step = random_step()
    step["old_logprobs"] = step["logprobs"].detach()
    (clipped,) = torch.autograd.grad(clipped_surrogate_loss(**step).loss_sum, step["logprobs"])
    plain = policy_gradient_loss(step["logprobs"], step["advantages"], step["weights"]).loss_sum
    torch.testing.assert_close(torch.autograd.grad(plain, step["logprobs"])[0], clipped)


@pytest.mark.parametrize("worst", [-math.inf, math.nan])
def test_a_token_of_weight_zero_cannot_make_a_loss_that_is_not_finite(worst):
    step = random_step()
    off = step["weights"] == 0
    assert off.any()
    step["old_logprobs"] = torch.where(off, worst, step["old_logprobs"])
    loss = clipped_surrogate_loss(**step).loss_sum
    (grad,) = torch.autograd.grad(loss, step["logprobs"])
    assert loss.isfinite() and grad.isfinite().all()


def test_clip_fraction_counts_the_tokens_whose_gradient_is_cut():
    ratio = torch.tensor([[0.5, 1.0, 1.5]])
    ones = torch.ones(1, 3)
    metrics = clipped_surrogate_loss(ratio.log(), 0 * ones, ones, ones).metrics
    assert metrics["clip_fraction"].item() == 1
    metrics = clipped_surrogate_loss(ratio.log(), 0 * ones, -ones, ones).metrics
    assert metrics["clip_fraction"].item() == 1


def test_a_sequence_ratio_is_the_geometric_mean_however_far_its_tokens_stray():
    log_ratio = torch.tensor([[40.0, -40.0, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    open_ended = {"clip_low": None, "clip_high": None}
    loss = sequence_clipped_surrogate_loss(
        log_ratio, 0 * log_ratio, torch.ones_like(weights), weights, **open_ended
    ).loss_sum
    assert loss.item() == pytest.approx(-(3 * math.exp(0.1) + math.exp(1.0)))
