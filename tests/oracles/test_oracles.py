"""Our losses, advantages and penalties against numbers that verl, TRL and OpenRLHF returned.

data/*.npz are made by `make oracles` (make.py, where inputs and options stand); the peers are not
needed here. Where a peer's convention is not ours, docs/conventions.md says which we take, and the
test states the difference. Everything is float64; tolerances above 1e-8 carry their reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlzoo.learning.advantages import (
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)
from rlzoo.learning.losses import (
    LossOutput,
    clipped_surrogate_loss,
    clipped_weight_loss,
    dpo_loss,
    kl_estimate,
    kl_to_reference,
    policy_gradient_loss,
    sequence_clipped_surrogate_loss,
    truncated_importance_weights,
    value_loss,
)
from rlzoo.learning.microbatching import AGGREGATIONS, token_weights
from rlzoo.learning.shaping import soft_overlong_penalty

MAX_LENGTH = 20
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
IS_CAP = 2.0
VALUE_CLIP = 0.3
PEER_KL_CAP = 10.0
TOLERANCE = 1e-8
LENGTH_EPSILON = 2e-8  # verl and OpenRLHF add 1e-8 to the length that divides a response's sum
SINGLE_PRECISION = 2e-6  # OpenRLHF's KL estimates are of float32 log-probs

DUAL_CLIPS = [("dual_clip_3", 3.0), ("no_dual_clip", None)]
TRL_LOSS_TYPES = [
    ("dapo", "token_mean"),
    ("bnpo", "token_mean"),
    ("grpo", "seq_mean_token_mean"),
    ("luspo", "seq_mean_token_sum"),
    ("dr_grpo", "fixed_length"),
]

dual_clips = pytest.mark.parametrize("label, dual_clip", DUAL_CLIPS)
aggregations = pytest.mark.parametrize("aggregation", AGGREGATIONS)


@cache
def stored(name: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).with_name("data") / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "header"}


def given(name: str) -> Tensor:
    return stored("inputs")[name]


def on_responses(values: Tensor) -> Tensor:
    """[tokens]: what stands at response tokens; peers differ in what they leave elsewhere."""
    return values[given("mask")]


def averaging(aggregation: str) -> tuple[Tensor, float]:
    """([N, T] float64 token weights, divisor) as docs/formulas.md 2 defines the aggregation."""
    mask = given("mask").double()
    rows, lengths = len(mask), mask.sum(-1, keepdim=True)
    return {
        "token_mean": (mask, float(mask.sum())),
        "seq_mean_token_mean": (mask / lengths, rows),
        "seq_mean_token_sum": (mask, rows),
        "fixed_length": (mask, rows * MAX_LENGTH),
    }[aggregation]


def tolerance_of(aggregation: str) -> float:
    return LENGTH_EPSILON if aggregation == "seq_mean_token_mean" else TOLERANCE


def repeated_advantages() -> Tensor:
    """[N, T]: each rollout's own advantage on all its tokens."""
    return given("advantages")[:, None].expand_as(given("mask"))


def policy_loss(
    loss: Callable[..., LossOutput], advantages: Tensor, aggregation: str, **options: float | None
) -> Callable[[Tensor], Tensor]:
    """The averaged loss as a function of the trained policy's log-probs."""
    weights, divisor = averaging(aggregation)
    old = given("old_logprobs")
    return lambda lp: loss(lp, old, advantages, weights, **options).loss_sum / divisor


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_as_peer(
    function: Callable[[Tensor], Tensor],
    at: Tensor,
    peer: str,
    name: str,
    tolerance: float = TOLERANCE,
) -> None:
    """The function's value and gradient are those that the peer returned."""
    leaf = at.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert_equal(value.detach(), stored(peer)[f"{name}/value"], tolerance)
    assert_equal(gradient, stored(peer)[f"{name}/gradient"], tolerance)


# --- policy losses --------------------------------------------------------------------------


@dual_clips
@pytest.mark.parametrize("batch", ["ordinary", "wild", "beyond"])
@aggregations
def test_the_clipped_surrogate_is_that_of_verl(aggregation, batch, label, dual_clip):
    options = {**CLIP, "dual_clip": dual_clip}
    loss = policy_loss(clipped_surrogate_loss, given("token_advantages"), aggregation, **options)
    name = f"clip/{batch}/{label}/{aggregation}"
    assert_as_peer(loss, given(f"logprobs/{batch}"), "verl", name, tolerance_of(aggregation))


@dual_clips
@pytest.mark.parametrize("batch", ["ordinary", "wild"])
@pytest.mark.parametrize("loss_type, aggregation", TRL_LOSS_TYPES)
def test_the_clipped_surrogate_is_that_of_trl(loss_type, aggregation, batch, label, dual_clip):
    """TRL's `delta` is the dual clip: a ratio over it, above the clip range, matters if A < 0."""
    options = {**CLIP, "dual_clip": dual_clip}
    loss = policy_loss(clipped_surrogate_loss, repeated_advantages(), aggregation, **options)
    name = f"clip/{batch}/{label}/{loss_type}"
    assert_as_peer(loss, given(f"logprobs/{batch}"), "trl", name)


@dual_clips
@pytest.mark.parametrize("batch", ["ordinary", "wild", "beyond"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_the_clipped_surrogate_is_that_of_openrlhf(aggregation, batch, label, dual_clip):
    options = {**CLIP, "dual_clip": dual_clip}
    loss = policy_loss(clipped_surrogate_loss, given("token_advantages"), aggregation, **options)
    name = f"clip/{batch}/{label}/{aggregation}"
    assert_as_peer(loss, given(f"logprobs/{batch}"), "openrlhf", name, tolerance_of(aggregation))


@pytest.mark.parametrize("batch", ["ordinary", "wild"])
@aggregations
def test_gspo_is_that_of_verl(aggregation, batch):
    """The mean log-ratio too stays below 10 nats here, where verl holds it."""
    loss = policy_loss(sequence_clipped_surrogate_loss, repeated_advantages(), aggregation, **CLIP)
    name = f"gspo/{batch}/{aggregation}"
    assert_as_peer(loss, given(f"logprobs/{batch}"), "verl", name, tolerance_of(aggregation))


@pytest.mark.parametrize("batch", ["ordinary", "wild"])
@pytest.mark.parametrize("peer, name", [("trl", "grpo"), ("openrlhf", "seq_mean_token_mean")])
def test_gspo_is_that_of_trl_and_openrlhf(peer, name, batch):
    loss = policy_loss(
        sequence_clipped_surrogate_loss, repeated_advantages(), "seq_mean_token_mean", **CLIP
    )
    name = f"gspo/{batch}/{name}"
    assert_as_peer(loss, given(f"logprobs/{batch}"), peer, name, LENGTH_EPSILON)


@pytest.mark.parametrize("batch", ["ordinary", "wild", "beyond"])
@aggregations
def test_cispo_is_that_of_verl_when_bounded_on_both_sides(aggregation, batch):
    loss = policy_loss(clipped_weight_loss, given("token_advantages"), aggregation, **CLIP)
    name = f"cispo/{batch}/{aggregation}"
    assert_as_peer(loss, given(f"logprobs/{batch}"), "verl", name, tolerance_of(aggregation))


@pytest.mark.parametrize("batch", ["ordinary", "wild"])
def test_cispo_is_that_of_trl_when_bounded_from_above_alone(batch):
    """TRL's `epsilon_high` is the bound itself, 1.28 here; ours is its distance from 1."""
    options = {"clip_low": None, "clip_high": 0.28}
    loss = policy_loss(clipped_weight_loss, repeated_advantages(), "token_mean", **options)
    assert_as_peer(loss, given(f"logprobs/{batch}"), "trl", f"cispo/{batch}")


@aggregations
def test_the_plain_policy_gradient_is_that_of_verl(aggregation):
    weights, divisor = averaging(aggregation)
    advantages = given("token_advantages")
    loss = lambda lp: policy_gradient_loss(lp, advantages, weights).loss_sum / divisor  # noqa: E731
    name = f"reinforce/{aggregation}"
    assert_as_peer(loss, given("logprobs/ordinary"), "verl", name, tolerance_of(aggregation))


@aggregations
def test_token_weights_average_a_loss_as_verl_does(aggregation):
    lengths = given("mask").sum(-1)
    per_token, divisor = token_weights(lengths, torch.ones(len(lengths)), aggregation, MAX_LENGTH)
    output = clipped_surrogate_loss(
        given("logprobs/ordinary"),
        given("old_logprobs"),
        given("token_advantages"),
        given("mask") * per_token[:, None],
        **CLIP,
    )
    expected = stored("verl")[f"clip/ordinary/no_dual_clip/{aggregation}/value"]
    assert_equal(output.loss_sum / divisor, expected, 1e-6)  # per_token is float32


# --- what the sampler's log-probs correct ----------------------------------------------------


def importance_weights(batch: str) -> Tensor:
    sampler = given(f"sampler_logprobs/{batch}")
    return truncated_importance_weights(given("old_logprobs"), sampler, given("mask"), IS_CAP)


@pytest.mark.parametrize("batch", ["ordinary", "beyond"])
def test_truncated_importance_weights_are_those_of_verl(batch):
    expected = stored("verl")[f"tis/{batch}/weights"]
    assert_equal(on_responses(importance_weights(batch)), on_responses(expected))


@pytest.mark.parametrize("batch", ["ordinary", "beyond"])
def test_advantages_times_importance_weights_give_the_corrected_loss_of_openrlhf(batch):
    """OpenRLHF does not bound the log-ratio from below: exp(-20), 2e-9, is its largest effect."""
    advantages = given("token_advantages") * importance_weights(batch)
    loss = policy_loss(clipped_surrogate_loss, advantages, "token_mean", **CLIP)
    name = f"tis/{batch}/token_mean"
    assert_as_peer(loss, given("logprobs/ordinary"), "openrlhf", name)


# --- divergences ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["ordinary", "wild"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_are_those_of_verl_which_caps_k3(estimator, batch):
    def capped(logprobs: Tensor) -> Tensor:
        kl = kl_estimate(logprobs, given(f"ref_logprobs/{batch}"), estimator)
        return kl.clamp(max=PEER_KL_CAP) if estimator == "k3" else kl

    assert_as_peer(capped, given("old_logprobs"), "verl", f"kl/{batch}/{estimator}")


@pytest.mark.parametrize("batch", ["ordinary", "wild"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_are_those_of_openrlhf_which_caps_all(estimator, batch):
    def capped(logprobs: Tensor) -> Tensor:
        kl = kl_estimate(logprobs, given(f"ref_logprobs/{batch}"), estimator)
        return kl.clamp(-PEER_KL_CAP, PEER_KL_CAP).float()

    name = f"kl/{batch}/{estimator}"
    assert_as_peer(capped, given("old_logprobs"), "openrlhf", name, SINGLE_PRECISION)


@pytest.mark.parametrize("batch", ["ordinary", "wild"])
def test_the_kl_term_is_that_of_trl_which_caps_nothing(batch):
    weights, divisor = averaging("token_mean")
    reference = given(f"ref_logprobs/{batch}")
    loss = lambda lp: kl_to_reference(lp, reference, weights, "k3") / divisor  # noqa: E731
    assert_as_peer(loss, given("old_logprobs"), "trl", f"kl/{batch}/k3/bnpo")


# --- advantages -----------------------------------------------------------------------------


def peer_advantages(name: str) -> Tensor:
    """[N]: verl's outcome advantages, of each response's first token."""
    return stored("verl")[f"{name}/advantages"][:, 0]


def alone() -> Tensor:
    """[N] bool: rollouts whose group has no other."""
    groups = given("group_ids")
    return (groups[:, None] == groups).sum(-1) == 1


def test_grpo_advantages_are_those_of_verl():
    ours = group_advantages(given("rewards"), given("group_ids"), epsilon=1e-6)
    assert_equal(ours[~alone()], peer_advantages("grpo")[~alone()])


def test_a_singletons_own_reward_is_its_grpo_advantage_in_verl():
    """verl takes a float32 std of 1 there, and adds its epsilon to it."""
    ours = group_advantages(given("rewards"), given("group_ids"), singleton="reward")
    assert_equal(ours[alone()] / (1 + 1e-6), peer_advantages("grpo")[alone()], 1e-7)


def test_unscaled_grpo_advantages_are_those_of_verl():
    ours = group_advantages(
        given("rewards"), given("group_ids"), scale_by_std=False, singleton="reward"
    )
    assert_equal(ours, peer_advantages("grpo_unscaled"))


@pytest.mark.parametrize("singleton, name", [("reward", "rloo"), ("zero", "rloo_vectorized")])
def test_leave_one_out_advantages_are_those_of_verls_two_functions(singleton, name):
    ours = leave_one_out_advantages(given("rewards"), given("group_ids"), singleton=singleton)
    assert_equal(ours, peer_advantages(name))


def test_reinforce_pp_baseline_advantages_are_those_of_verl():
    centred = group_advantages(
        given("rewards"), given("group_ids"), scale_by_std=False, singleton="reward"
    )
    ours = whiten(centred, given("mask").sum(-1))
    assert_equal(ours, peer_advantages("reinforce_pp_baseline"))


# --- the critic -----------------------------------------------------------------------------


@pytest.mark.parametrize("label, gamma, lam", [("undiscounted", 1, 1), ("discounted", 0.97, 0.9)])
def test_generalized_advantages_and_returns_are_those_of_verl(label, gamma, lam):
    mask = given("mask")
    rewards = given("token_rewards") - given("token_penalties")
    ours = generalized_advantages(rewards, given("old_values"), mask, gamma=gamma, lam=lam)
    expected = stored("verl")
    advantages = expected[f"gae/{label}/advantages"]
    assert_equal(on_responses(whiten(ours.advantages, mask)), on_responses(advantages))
    assert_equal(on_responses(ours.returns), on_responses(expected[f"gae/{label}/returns"]))


@pytest.mark.parametrize(
    "peer, label, clip",
    [
        ("verl", "clipped", VALUE_CLIP),
        ("openrlhf", "clipped", VALUE_CLIP),
        ("openrlhf", "unclipped", None),
    ],
)
def test_the_value_loss_is_that_of_verl_and_openrlhf(peer, label, clip):
    weights, divisor = averaging("token_mean")
    loss = lambda v: (  # noqa: E731
        value_loss(v, given("old_values"), given("returns"), weights, clip).loss_sum / divisor
    )
    assert_as_peer(loss, given("values"), peer, f"value_loss/{label}")


# --- preferences and lengths ----------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    "name, options",
    [
        ("sigmoid", {}),
        ("smoothed", {"label_smoothing": 0.1}),
        ("ipo", {"kind": "ipo"}),
    ],
)
def test_the_dpo_loss_of_summed_logprobs_is_that_of_openrlhf(name, options, beta):
    rejected = given("rejected_logprobs") - given("ref_rejected_logprobs")

    def loss(chosen_logprobs: Tensor) -> Tensor:
        chosen = chosen_logprobs - given("ref_chosen_logprobs")
        return dpo_loss(chosen, rejected, beta=beta, **options).mean()

    assert_as_peer(loss, given("chosen_logprobs"), "openrlhf", f"dpo/beta_{beta}/{name}")


@pytest.mark.parametrize("buffer", [8, 5])
def test_the_soft_overlong_penalty_is_that_of_trl(buffer):
    ours = soft_overlong_penalty(given("response_lengths"), MAX_LENGTH, buffer)
    expected = stored("trl")[f"overlong/buffer_{buffer}/penalties"]
    assert_equal(ours, expected.float(), 1e-7)  # float32: a fifth has no exact value
