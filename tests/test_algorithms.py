"""What makes each algorithm that algorithm: what it trains on, credits and minimises."""

import math

import pytest
import torch

from rlzoo.algos import PolicyAlgorithm
from rlzoo.errors import UserError
from rlzoo.types import RolloutBatch, Rollouts
from tests.recorded import recorded_rollouts
from tests.test_values import refusal
from tests.zoo import build, gradient, prepared

OUT = None  # does not train
TENSORS = (*RolloutBatch.ALWAYS, "old_logprobs")


def step(*groups: list[float], seed: int = 0) -> Rollouts:
    """Rollouts with these rewards by group; each one's engine log-probs are its own index."""
    rollouts = recorded_rollouts(tuple(map(len, groups)), seed)
    rollouts.rewards = torch.tensor([reward for group in groups for reward in group])
    rollouts.sampler_logprobs = [
        torch.full_like(x, i) for i, x in enumerate(rollouts.sampler_logprobs)
    ]
    return rollouts


def rows(batches: list[RolloutBatch]) -> list[int]:
    """The rollout in each row of the microbatches, in order."""
    kept = [batch for batch in batches if batch.response_mask.any()]
    return [int(i) for batch in kept for i in batch.sampler_logprobs[:, 0]]


def credit(name: str, *groups: list[float], **changes: object) -> list[float | None]:
    """Each rollout's advantage, OUT if it does not train."""
    rollouts = step(*groups)
    batches = prepared(build(name, **changes), rollouts)
    found: list[float | None] = [OUT] * len(rollouts)
    for i, advantage in zip(rows(batches), batches[0].advantages[:, 0].tolist(), strict=True):
        found[i] = round(advantage, 3)
    return found


ONE_OF_FOUR, SOLVED, UNSOLVED, ALONE = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0]
STD_OF_ONE_IN_FOUR = 1.0  # of rewards +1, -1, -1, -1, unbiased
NAMED = {
    "raft": [1, OUT, OUT, OUT, 1, 1, OUT, OUT, 1],
    "raft_pp": [1, OUT, OUT, OUT, 1, 1, OUT, OUT, 1],
    "reinforce": [1, -1, -1, -1, 1, 1, -1, -1, 1],
    "reinforce_mean_zero": [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0, 0],
    "reinforce_no_all_correct": [1, -1, -1, -1, OUT, OUT, -1, -1, OUT],
    "reinforce_no_all_wrong": [1, -1, -1, -1, 1, 1, OUT, OUT, 1],
    "reinforce_rej": [1, -1, -1, -1, OUT, OUT, OUT, OUT, OUT],
    "reinforce_rej_std": [*(x / STD_OF_ONE_IN_FOUR for x in (1, -1, -1, -1)), *[OUT] * 5],
    "grpo": [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0, 0],
    "gspo": [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0, 0],
    "cispo": [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0, 0],
    "dr_grpo": [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0, 0],
    "dapo": [1.5, -0.5, -0.5, -0.5, OUT, OUT, OUT, OUT, OUT],
    "rloo": [1, -0.333, -0.333, -0.333, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("name", NAMED)
def test_the_credit_is_that_of_the_paper(name):
    """docs/formulas.md 6.4 and 10: one right of four, all right, all wrong, a right one alone."""
    found = credit(name, ONE_OF_FOUR, SOLVED, UNSOLVED, ALONE)
    assert found == pytest.approx(NAMED[name], abs=2e-3)


def test_a_std_other_than_one_scales_reinforce_rej_std():
    assert credit("reinforce_rej_std", [1.0, 1.0, 0.0]) == pytest.approx(
        [3**0.5 / 2, 3**0.5 / 2, -(3**0.5) / 2], abs=1e-3
    )


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_group_of_one_gets_its_reward_if_asked(name):
    assert credit(name, ALONE, singleton="reward") == [1.0]
    assert credit(name, ALONE, singleton="zero") == [0.0]


def test_rejected_rollouts_may_stay_with_no_credit():
    assert credit("reinforce_rej", ONE_OF_FOUR, SOLVED, rejected="zero") == [1, -1, -1, -1, 0, 0]


def test_reinforce_pp_baseline_has_mean_zero_and_variance_one_over_tokens():
    rollouts = step(ONE_OF_FOUR, [1.0, 0.0], SOLVED)
    (batch,) = prepared(build("reinforce_pp_baseline"), rollouts)
    tokens = batch.advantages[batch.response_mask]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-6)
    assert tokens.var().item() == pytest.approx(1, abs=1e-5)


def test_an_answer_near_the_length_limit_loses_reward_in_dapo():
    rollouts = step([1.0, 1.0, 0.0])
    rollouts.responses = [torch.full((n,), 5) for n in (4, 12, 4)]
    rollouts.sampler_logprobs = [torch.zeros(n) for n in (4, 12, 4)]
    algo = build("dapo", overlong_buffer=0.5)  # the last 6 of 12 tokens
    shaped = algo.shape_rewards(rollouts)
    assert shaped.tolist() == [1.0, 0.0, -1.0]
    rollouts.responses[1] = torch.full((9,), 5)
    assert algo.shape_rewards(rollouts).tolist() == [1.0, 0.5, -1.0]


def test_truncated_rollouts_do_not_train_if_they_are_filtered():
    rollouts = step(ONE_OF_FOUR)
    rollouts.truncated[1] = True
    for rejected, expected in (("drop", [0, 2, 3]), ("zero", [0, 1, 2, 3])):
        algo = build("grpo", overlong_filter=True, rejected=rejected)
        batches = prepared(algo, rollouts)
        assert sorted(rows(batches)) == expected
        credited = dict(zip(rows(batches), batches[0].advantages[:, 0].tolist(), strict=True))
        assert credited.get(1, 0.0) == 0.0 and credited[0] == pytest.approx(1.5, abs=1e-3)


def test_kl_in_the_reward_lowers_it_by_the_kl_of_the_whole_response():
    algo = build("rloo", kl_coef=0.5, kl_in="reward", kl_estimator="k1")
    for parameter in algo.frozen["ref"].parameters():
        parameter.data *= 0.8
    rollouts = step(ONE_OF_FOUR)
    prepared(algo, rollouts)
    scores = rollouts.scores
    kl = [
        (o - r).sum() for o, r in zip(scores["old_logprobs"], scores["ref_logprobs"], strict=True)
    ]
    assert max(map(abs, kl)) > 0.1
    expected = rollouts.rewards - 0.5 * torch.stack(kl)
    torch.testing.assert_close(algo.shape_rewards(rollouts), expected)


def test_truncated_importance_sampling_scales_tokens_by_trainer_over_engine_up_to_the_cap():
    rollouts, cap = recorded_rollouts((2, 2)), 1.5
    plain, corrected = build("reinforce"), build("reinforce", tis_cap=cap)
    (batch,) = prepared(plain, rollouts)
    batch.old_logprobs = plain.forward_scores(batch)["logprobs"].detach()
    offset = torch.tensor([[0.2], [-0.3], [2.0], [0.0]]) * batch.response_mask
    batch.sampler_logprobs = batch.old_logprobs - offset
    ratio = offset.exp().clamp(max=cap)
    assert ratio.max() == cap
    expected = plain.policy_loss(
        batch.old_logprobs, batch.replaced(advantages=batch.advantages * ratio)
    ).loss_sum
    loss = corrected.total_loss(corrected.forward_scores(batch), batch).metrics["loss"]
    torch.testing.assert_close(loss, expected)


def surrogate_gradient(algo: PolicyAlgorithm, ratio: float, advantage: float) -> torch.Tensor:
    """d loss / d logprobs at one ratio, of one response of three tokens of weight 1."""
    ones = torch.ones(1, 3)
    logprobs = torch.full((1, 3), math.log(ratio), requires_grad=True)
    names = dict.fromkeys(TENSORS, torch.zeros(1, 3))
    batch = RolloutBatch(names | {"weights": ones, "advantages": advantage * ones}, divisor=3.0)
    (grad,) = torch.autograd.grad(algo.policy_loss(logprobs, batch).loss_sum, logprobs)
    return grad


def test_clipping_is_what_tells_the_surrogates_apart():
    far = {name: surrogate_gradient(build(name), 1.25, 1.0) for name in ("grpo", "dapo", "gspo")}
    assert not far["grpo"].any() and not far["gspo"].any()  # beyond 1.2 and 1.0004
    torch.testing.assert_close(far["dapo"], torch.full((1, 3), -1.25))  # within 1.28
    beyond = surrogate_gradient(build("cispo"), 9.0, 1.0)
    torch.testing.assert_close(beyond, torch.full((1, 3), -5.0))  # held at 5, still a gradient
    for name in ("raft_pp", "raft_pp_clip_higher"):
        assert not surrogate_gradient(build(name), 1.5, 1.0).any()
    open_ended = surrogate_gradient(build("raft_pp_no_clip"), 9.0, 1.0)
    torch.testing.assert_close(open_ended, torch.full((1, 3), -9.0))


def test_within_the_clip_a_sequence_ratio_spreads_each_tokens_gradient_over_the_response():
    grad = surrogate_gradient(build("gspo", clip_high=1.0), 1.5, 1.0)
    torch.testing.assert_close(grad, torch.full((1, 3), -1.5))
    ones, names = torch.ones(1, 3), dict.fromkeys(TENSORS, torch.zeros(1, 3))
    batch = RolloutBatch(names | {"weights": torch.tensor([[1.0, 0, 0]]), "advantages": ones}, 1.0)
    logprobs = torch.zeros(1, 3, requires_grad=True)
    loss = build("gspo").policy_loss(logprobs, batch).loss_sum
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [[-1.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_a_dual_clip_that_would_do_nothing_is_refused(name):
    with pytest.raises(UserError, match="algo.dual_clip=3.0 would do nothing"):
        build(name, dual_clip=3.0)


@pytest.mark.parametrize("name", ["raft", "raft_pp", "iterative_dpo"])
@pytest.mark.parametrize("changes", [{"overlong_buffer": 0.2}, {"kl_coef": 0.1, "kl_in": "reward"}])
def test_a_penalty_in_a_reward_that_only_selects_is_refused(name, changes):
    with pytest.raises(UserError, match="would do nothing"):
        build(name, **changes)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("grpo", "kl_estimator", "k4"),
        ("grpo", "kl_in", "both"),
        ("grpo", "passes", 0),
        ("grpo", "entropy_coef", -0.1),
        ("grpo", "tis_cap", 0.5),
        ("grpo", "overlong_buffer", 1.0),
        ("grpo", "clip_high", 0.0),
        ("grpo", "clip_high", "nan"),
        ("grpo", "clip_low", 1.0),
        ("grpo", "dual_clip", 1.0),
        ("grpo", "group_size", 1),
        ("grpo", "aggregation", "mean"),
        ("grpo", "rejected", "keep"),
        ("grpo", "reward_scale", "ten"),
        ("grpo", "kl_coef", -0.1),
        ("grpo", "overlong_penalty", -1),
        ("grpo", "temperature", "nan"),
        ("grpo", "max_logprob_gap", -1.0),
        ("grpo", "max_skipped_updates", -1),
        ("grpo", "max_response_tokens", 0),
        ("iterative_dpo", "nll_coef", -1),
        ("ppo", "value_coef", "nan"),
        ("reinforce", "baseline", "median"),
        ("ppo", "critic", "none"),
        ("ppo", "lam", 1.1),
        ("ppo", "gamma", -0.1),
        ("ppo", "critic_lr", 0.0),
        ("ppo", "value_clip", 0.0),
        ("ppo", "critic_warmup", -1),
        ("iterative_dpo", "beta", 0.0),
        ("iterative_dpo", "label_smoothing", 0.5),
        ("iterative_dpo", "loss", "hinge"),
        ("iterative_dpo", "reference", "last"),
        ("rloo", "singleton", "one"),
        ("reinforce_pp_baseline", "singleton", "one"),
    ],
)
def test_a_value_out_of_range_is_named_at_start_up(name, key, value):
    assert f"algo.{key} must be" in refusal(f"algo={name}", f"algo.{key}={value}")


def test_pairs_are_counted_by_one_aggregation_alone():
    with pytest.raises(UserError, match="algo.aggregation=seq_mean_token_mean alone"):
        build("iterative_dpo", aggregation="token_mean")


@pytest.mark.parametrize("pair", [("raft", "raft_pp"), ("grpo", "cispo"), ("grpo", "gspo")])
def test_on_the_policy_these_have_one_gradient(pair):
    rollouts = step(ONE_OF_FOUR, SOLVED, [1.0, 0.0, 0.0])
    same = {"aggregation": "token_mean", "rejected": "drop"}
    ours, theirs = (gradient(build(name, **same), rollouts, drift=0.0) for name in pair)
    assert ours.norm() > 1e-3
    if pair[1] == "gspo":  # a response's gradient is spread over it: the same where lengths are 1
        rollouts.responses = [r[:1] for r in rollouts.responses]
        rollouts.sampler_logprobs = [s[:1] for s in rollouts.sampler_logprobs]
        ours, theirs = (gradient(build(name, **same), rollouts, drift=0.0) for name in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_entropy_bonus_has_the_gradient_of_the_mean_entropy():
    rollouts = step([1.0, 1.0], [0.0, 0.0, 0.0])  # GRPO's own gradient is 0
    algo = build("grpo", entropy_coef=0.5, temperature=0.7)
    found = gradient(algo, rollouts)
    algo.zero_grad()
    total = 0.0
    for group, response in zip(rollouts.group_ids.tolist(), rollouts.responses, strict=True):
        prompt = torch.tensor(rollouts.prompts[group].token_ids)
        logits = algo.policy(torch.cat([prompt, response])[None]).logits[0] / 0.7
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total = total - (logprobs.exp() * logprobs).sum()
    (-0.5 * total / rollouts.lengths.sum()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in algo.parameters()])
    assert expected.norm() > 1e-3
    assert (found - expected).norm() / expected.norm() < 1e-4
