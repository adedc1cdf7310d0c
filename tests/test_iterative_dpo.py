"""Iterative DPO: which pairs, against which reference, and the loss on them."""

import math

import pytest
import torch

from rlzoo.types import RolloutBatch, Rollouts
from tests.recorded import recorded_rollouts
from tests.zoo import build, prepared


def step(*groups: list[float]) -> Rollouts:
    """Rollouts with these rewards by group; each one's engine log-probs are its own index."""
    rollouts = recorded_rollouts(tuple(map(len, groups)))
    rollouts.rewards = torch.tensor([reward for group in groups for reward in group])
    rollouts.sampler_logprobs = [
        torch.full_like(x, i) for i, x in enumerate(rollouts.sampler_logprobs)
    ]
    return rollouts


def pairs(batches: list[RolloutBatch]) -> list[list[tuple[int, int]]]:
    """(chosen, rejected) of each microbatch's rows; none where it is empty."""
    found = []
    for batch in batches:
        ids = [int(i) for i in batch.sampler_logprobs[:, 0]] if batch.response_mask.any() else []
        found.append(list(zip(ids[0::2], ids[1::2], strict=True)))
    return found


GROUPS = ([0.0, 1.0, 1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0], [1.0, 0.0])
EXPECTED = {(1, 0), (9, 8), (11, 12)}  # best and worst, the first of equals


def test_one_pair_for_each_prompt_with_right_and_wrong_rollouts():
    (batch,) = prepared(build("iterative_dpo"), step(*GROUPS))
    assert set(pairs([batch])[0]) == EXPECTED


@pytest.mark.parametrize("updates, parts", [(1, 4), (3, 1), (2, 2), (4, 2)])
def test_a_pair_is_never_split(updates, parts):
    algo = build("iterative_dpo", updates=updates)
    batches = prepared(algo, step(*GROUPS), parts)
    assert len(batches) >= updates
    found = [pair for batch in pairs(batches) for pair in batch]
    assert sorted(found) == sorted(EXPECTED)


def test_both_wrong_is_a_pair_only_if_asked():
    graded = ([0.5, 0.0], [1.0, 0.5])
    for strict, expected in ((True, {(2, 3)}), (False, {(0, 1), (2, 3)})):
        algo = build("iterative_dpo", chosen_must_be_correct=strict)
        (batch,) = prepared(algo, step(*graded))
        assert set(pairs([batch])[0]) == expected


def loss_and_gradient(
    chosen: float, rejected: float, **changes: object
) -> tuple[float, list[list[float]]]:
    """Mean loss of a pair of two tokens each at summed log-ratios, and d loss / d logprobs."""
    algo = build("iterative_dpo", **changes)
    rollouts = step([1.0, 0.0])
    rollouts.responses = [torch.tensor([5, 6]), torch.tensor([7, 8])]
    rollouts.sampler_logprobs = [torch.zeros(2), torch.ones(2)]
    (batch,) = prepared(algo, rollouts)
    anchor = batch.ref_logprobs if algo.reference == "initial" else batch.old_logprobs
    logprobs = anchor + torch.tensor([[chosen / 2], [rejected / 2]])
    logprobs.requires_grad_()
    loss = algo.policy_loss(logprobs, batch).loss_sum / batch.divisor
    return loss.item(), torch.autograd.grad(loss, logprobs)[0].tolist()


def test_at_the_reference_the_loss_is_log_two_and_pulls_the_pair_apart():
    loss, grad = loss_and_gradient(0.0, 0.0, beta=0.2)
    assert loss == pytest.approx(math.log(2))
    assert grad == [pytest.approx([-0.1, -0.1]), pytest.approx([0.1, 0.1])]  # beta / 2 a token


@pytest.mark.parametrize("reference", ["iteration_start", "initial"])
def test_the_loss_has_its_known_values(reference):
    """docs/formulas.md 10: beta times the margin is 0.2."""
    options = {"beta": 0.1, "reference": reference}
    assert loss_and_gradient(1.5, -0.5, **options)[0] == pytest.approx(0.59814, abs=1e-5)
    smoothed = loss_and_gradient(1.5, -0.5, label_smoothing=0.1, **options)[0]
    assert smoothed == pytest.approx(0.61814, abs=1e-5)
    ipo = loss_and_gradient(1.5, -0.5, loss="ipo", **options)[0]
    assert ipo == pytest.approx((2 - 1 / 0.2) ** 2)


def test_the_nll_term_is_the_mean_over_the_chosen_response_alone():
    algo = build("iterative_dpo", nll_coef=0.5)
    rollouts = step([1.0, 0.0])
    (batch,) = prepared(algo, rollouts)
    logprobs = batch.old_logprobs
    plain = build("iterative_dpo").policy_loss(logprobs, batch).loss_sum
    added = algo.policy_loss(logprobs, batch).loss_sum - plain
    expected = -0.5 * rollouts.scores["old_logprobs"][0].mean()
    assert (added / batch.divisor).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_reference_at_iteration_start_is_the_policy_that_drew_the_pairs():
    start, initial = build("iterative_dpo"), build("iterative_dpo", reference="initial")
    assert not start.frozen and initial.frozen
    for algo in (start, initial):
        for parameter in algo.policy.parameters():
            parameter.data *= 0.9  # trained on since the beginning
        (batch,) = prepared(algo, recorded_rollouts((4, 4)))
        assert hasattr(batch, "ref_logprobs") == (algo is initial)  # computed where it is needed
        anchor = batch.ref_logprobs if algo is initial else torch.zeros_like(batch.old_logprobs)
        mask = batch.response_mask
        at_reference = torch.allclose(batch.old_logprobs[mask], anchor[mask])
        loss = algo.policy_loss(batch.old_logprobs, batch).loss_sum / batch.divisor
        is_log_two = abs(loss.item() - math.log(2)) < 1e-5
        assert is_log_two == (algo is start) and not at_reference


def test_metrics_are_means_over_pairs():
    algo = build("iterative_dpo")
    (batch,) = prepared(algo, step(*GROUPS))
    scale = torch.ones(len(batch.old_logprobs), 1)
    scale[0::2] = 0.5  # chosen became likelier, in all but the last pair
    scale[-2], scale[-1] = 2.0, 0.5
    metrics = algo.policy_loss(batch.old_logprobs * scale, batch).metrics
    assert (metrics["dpo/accuracy"] / batch.weights.sum()).item() == pytest.approx(2 / 3)
