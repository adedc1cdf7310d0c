"""`algo.old_logprobs=engine`: the ratio is taken to the engine, and no pass is made for it."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from rlzoo.errors import UserError
from rlzoo.learning.losses import clipped_surrogate_loss, engine_as_old
from rlzoo.types import RolloutBatch
from tests import warm
from tests.recorded import recorded_rollouts
from tests.zoo import build, prepared


def a_microbatch(name: str, **options: object) -> tuple[object, RolloutBatch, torch.Tensor]:
    """The algorithm, a microbatch whose engine is 0.4 nats off here and there, and log-probs."""
    algo = build(name, old_logprobs="engine", **options)
    batch = prepared(algo, recorded_rollouts((2, 2), longest=6))[0]
    logprobs = algo.forward_scores(batch)["logprobs"].detach()
    batch.sampler_logprobs = logprobs + 0.4 * torch.sin(9 * logprobs) * batch.response_mask
    return algo, batch, logprobs


def test_the_ratio_is_that_of_the_policy_to_the_engine():
    algo, batch, logprobs = a_microbatch("grpo")
    logprobs.requires_grad_()
    found = algo.policy_loss(logprobs, algo.weighed(batch, logprobs.detach())).loss_sum
    expected = clipped_surrogate_loss(
        logprobs, batch.sampler_logprobs, batch.advantages, batch.weights, dual_clip=3.0
    ).loss_sum
    torch.testing.assert_close(found, expected)
    assert found != algo.policy_loss(logprobs, batch).loss_sum  # of the trainer's own


@pytest.mark.parametrize(
    ("ratio", "held"), [(0.5, 0.5), (1.9, 1.9), (4.0, 2.0)], ids=["below", "within", "beyond"]
)
def test_a_cap_truncates_the_ratio_and_leaves_its_gradient(ratio, held):
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    ones = torch.ones(1, 1)
    old = engine_as_old(logprobs, -ones, ones.bool(), cap=2.0)
    loss = clipped_surrogate_loss(logprobs, old, -ones, ones, clip_low=0.9).loss_sum
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss, torch.tensor(held))
    torch.testing.assert_close(gradient, held * ones)


def test_a_loss_without_a_ratio_is_weighed_by_policy_over_engine():
    algo, batch, logprobs = a_microbatch("raft", tis_cap=1.2)
    batch.old_logprobs = logprobs - 7.0  # which the trainer found before; nobody reads it
    weights = (logprobs - batch.sampler_logprobs).exp().clamp(max=1.2)
    assert (weights == 1.2).any() and (weights < 1.2).any()
    found = algo.weighed(batch, logprobs).advantages
    torch.testing.assert_close(found, batch.advantages * weights)


def test_no_pass_is_made_for_old_log_probs_after_the_first_step(monkeypatch):
    for source, passes in (("trainer", 1), ("engine", 0)):
        algo = build("grpo", updates=2, old_logprobs=source)
        rule = type(algo).must_score_old
        assert rule(algo, first=True)
        assert rule(algo, first=False) == bool(passes)
    with_reference = build("ppo", updates=2, old_logprobs="engine", kl_coef=0.1, kl_in="reward")
    assert not type(with_reference).must_score_old(with_reference, first=False)


def test_credit_takes_the_kl_at_sampling_time_from_the_engine():
    algo = build("rloo", kl_coef=0.5, kl_in="reward", kl_estimator="k1", old_logprobs="engine")
    rollouts = recorded_rollouts((2, 2))
    prepared(algo, rollouts)
    plain = algo.credit(rollouts).advantages
    rollouts.sampler_logprobs[0] = rollouts.sampler_logprobs[0] - 2.0
    assert not torch.equal(
        torch.as_tensor(algo.credit(rollouts).advantages), torch.as_tensor(plain)
    )


def test_a_run_leaves_the_pass_out_and_watches_the_gap_all_the_same(tmp_path):
    warm.passed(tmp_path, "algo.old_logprobs=engine", "algo.tis_cap=2.0")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    steps = [row for row in rows if row["logprob_gap/mean"]]
    assert len(steps) == 2 and all(float(row["logprob_gap/mean"]) < 1e-3 for row in steps)
    assert all(0 < float(row["logprob_gap/max"]) for row in steps)


def test_what_has_no_meaning_beside_it_is_refused(tmp_path):
    truncated = ("datamodule.top_k=5", "datamodule.allow_truncated_sampling=true")
    told = warm.refused(tmp_path, "algo.old_logprobs=engine", *truncated)
    assert "algo.old_logprobs=engine with datamodule.top_p=1.0 and top_k=5" in told
    with pytest.raises(UserError, match="algo.old_logprobs=engine: IterativeDPO has no ratio"):
        build("iterative_dpo", old_logprobs="engine")
    assert "algo.old_logprobs" in build("raft", old_logprobs="engine").idle_options()
    assert not build("raft", old_logprobs="engine", tis_cap=2.0).idle_options().keys() & {
        "algo.old_logprobs"
    }
    bounded = build("cispo", old_logprobs="engine", tis_cap=2.0).idle_options()
    assert "algo.clip_high" in bounded  # of 5, where the cap is 2
    assert "algo.dual_clip" in build("grpo", old_logprobs="engine", tis_cap=2.0).idle_options()
