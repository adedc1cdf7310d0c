"""docs/architecture.md, "The laws": what every algorithm obeys, as its YAML has it."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlzoo.types import Rollouts, Update
from tests.recorded import recorded_rollouts
from tests.zoo import NAMES, build, gradient, planned, prepared

EVERY = pytest.mark.parametrize("name", NAMES)
RAGGED = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


def mixed(sizes: tuple[int, ...] = (3, 1, 4, 2), seed: int = 0) -> Rollouts:
    """Recorded rollouts whose larger groups hold right and wrong ones."""
    rollouts = recorded_rollouts(sizes, seed)
    starts = torch.tensor((0, *sizes)).cumsum(0)[:-1]
    for start, size in zip(starts.tolist(), sizes, strict=True):
        if size > 1:
            rollouts.rewards[start], rollouts.rewards[start + 1] = 1.0, 0.0
    return rollouts


def reordered(rollouts: Rollouts, order: list[int]) -> Rollouts:
    pick = lambda values: [values[i] for i in order]  # noqa: E731
    return dataclasses.replace(
        rollouts,
        group_ids=rollouts.group_ids[order],
        responses=pick(rollouts.responses),
        sampler_logprobs=pick(rollouts.sampler_logprobs),
        truncated=rollouts.truncated[order],
        rewards=rollouts.rewards[order],
        verdicts=rollouts.verdicts[order],
        scores={},
    )


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 1e-4
    assert (actual - expected).norm() / expected.norm() < 1e-5


@EVERY
@settings(max_examples=4, deadline=None)
@given(sizes=RAGGED.filter(lambda s: max(s) > 1), parts=st.integers(2, 8), seed=st.integers(0, 9))
@example(sizes=(1, 2), parts=2, seed=2)
def test_the_gradient_does_not_depend_on_the_number_of_microbatches(name, sizes, parts, seed):
    algo, rollouts = build(name), mixed(sizes, seed)
    whole, drift = gradient(algo, rollouts), 0.3
    if not whole.any():  # every response lies beyond its clip: drift to where none clips it
        drift = -0.3
        whole = gradient(algo, rollouts, drift=drift)
    assert_same(gradient(algo, rollouts, parts, drift), whole)


@EVERY
def test_the_gradient_does_not_depend_on_the_order_of_rollouts(name):
    algo, rollouts = build(name), mixed()
    order = [7, 2, 9, 0, 3, 6, 1, 4, 8, 5]
    if name == "iterative_dpo":  # among equals the first is paired: keep the order within groups
        order = [4, 5, 6, 7, 8, 9, 3, 0, 1, 2]
    assert_same(gradient(algo, reordered(rollouts, order)), gradient(algo, rollouts))


@EVERY
def test_every_rank_makes_the_same_plan_and_keeps_its_own_part(name):
    algo, rollouts = build(name, updates=2), mixed()
    prepared(algo, rollouts)
    whole = planned(algo, rollouts)
    parts = [planned(algo, rollouts, rank=rank, world_size=3) for rank in range(3)]
    for update, batch in enumerate(whole):
        shares = [part[update] for part in parts]
        assert all(share.divisor == batch.divisor for share in shares)
        for tensor in ("weights", "advantages"):
            total = sum(float(getattr(share, tensor).double().sum()) for share in shares)
            assert total == pytest.approx(float(getattr(batch, tensor).double().sum()), abs=1e-5)


@EVERY
@settings(max_examples=5, deadline=None)
@given(sizes=RAGGED, seed=st.integers(0, 99), far=st.sampled_from([50.0, 1000.0]))
def test_nothing_becomes_infinite_however_far_the_old_policy_is(name, sizes, seed, far):
    found = gradient(build(name), recorded_rollouts(sizes, seed), drift=far)
    assert found.isfinite().all()


@EVERY
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_without_contrast_never_give_a_gradient_that_is_not_finite(name, reward):
    rollouts = recorded_rollouts((1, 4, 1))
    rollouts.rewards.fill_(reward)
    assert gradient(build(name), rollouts).isfinite().all()


NEEDS_CONTRAST = [
    *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline"),
    *("reinforce_mean_zero", "reinforce_rej", "reinforce_rej_std", "iterative_dpo"),
]


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("name", NEEDS_CONTRAST)
def test_groups_without_contrast_teach_a_method_with_a_baseline_nothing(name, reward):
    rollouts = recorded_rollouts((1, 4, 3))
    rollouts.rewards.fill_(reward)
    algo = build(name, overlong_buffer=0.0)
    assert not gradient(algo, rollouts).any()


def test_the_list_of_methods_that_need_contrast_is_complete():
    rollouts = recorded_rollouts((4, 3))
    rollouts.rewards.fill_(1.0)
    silent = {n for n in NAMES if not gradient(build(n, overlong_buffer=0.0), rollouts).any()}
    assert silent == {*NEEDS_CONTRAST, "reinforce_no_all_correct"}


WITHOUT_GROUPS = ["raft", "raft_pp", "raft_pp_no_clip", "reinforce"]


@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_a_rollout_of_weight_two_counts_as_two_and_of_weight_zero_as_none(name):
    algo, rollouts = build(name), mixed()
    copies = [0, 0, 2, 3, 3, 4, 5, 6, 7, 8, 9]  # 0 and 3 twice, 1 left out
    weights = torch.ones(10)
    weights[[0, 3]], weights[1] = 2.0, 0.0
    weighted = dataclasses.replace(rollouts, weights=weights)
    assert_same(gradient(algo, weighted), gradient(algo, reordered(rollouts, copies)))


@EVERY
def test_padding_columns_change_nothing(name):
    algo, rollouts = build(name), mixed()
    found = []
    for extra in (0, 3):
        (batch,) = prepared(algo, rollouts)
        algo.zero_grad()
        wider = {}
        for key, tensor in batch.tensors().items():
            if tensor.dim() == 2 and extra:
                tensor = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], extra)], dim=1)
            wider[key] = tensor
        batch = batch.replaced(**wider)
        algo.training_step(Update([batch]), 0).backward()
        found.append(torch.cat([p.grad.flatten() for p in algo.parameters() if p.grad is not None]))
    assert_same(found[1], found[0])


@EVERY
@pytest.mark.parametrize("passes, updates", [(1, 3), (2, 2)])
def test_every_pass_trains_every_unit_once(name, passes, updates):
    algo, rollouts = build(name, passes=passes, updates=updates), mixed()
    batches = prepared(algo, rollouts, parts=2)
    assert len(batches) >= passes * updates
    trained = sorted(i for unit in algo.training_units(rollouts) for i in unit)
    expected = int(rollouts.lengths[trained].sum()) * passes
    assert sum(int(batch.response_mask.sum()) for batch in batches) == expected


@EVERY
def test_kl_and_entropy_enter_the_loss_with_their_weights(name):
    rollouts = mixed()
    changes = {"kl_coef": 0.5, "entropy_coef": 0.25}
    plain, added = build(name), build(name, **changes)
    for parameter in added.frozen["ref"].parameters():
        parameter.data *= 0.7  # a reference that differs
    (batch,), (same,) = prepared(added, rollouts), prepared(plain, mixed())
    batch.old_logprobs = same.old_logprobs = 0.9 * batch.sampler_logprobs
    metrics = added.total_loss(added.forward_scores(batch), batch).metrics
    base = plain.total_loss(plain.forward_scores(same), same).metrics["loss"]
    expected = base + 0.5 * metrics["ref_kl"] - 0.25 * metrics["entropy"]
    assert metrics["ref_kl"] > 0.01 and metrics["entropy"] > 0.01
    torch.testing.assert_close(metrics["loss"], expected, rtol=1e-4, atol=1e-5)
