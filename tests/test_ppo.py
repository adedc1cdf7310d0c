"""PPO by hand: credit from a critic, two learning rates, a critic that warms up."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from rlzoo.algos import PPO
from rlzoo.loop import updates_of
from rlzoo.types import Rollouts, Update
from tests.conftest import make_tiny_model
from tests.recorded import recorded_rollouts
from tests.zoo import build, flat, gradient, prepared


def two_tokens(rewards: list[float]) -> Rollouts:
    rollouts = recorded_rollouts((len(rewards),))
    rollouts.responses = [torch.tensor([5, 6]) for _ in rewards]
    rollouts.sampler_logprobs = [torch.zeros(2) for _ in rewards]
    rollouts.rewards = torch.tensor(rewards)
    return rollouts


def constant_critic(value: float, **changes: object) -> PPO:
    algo = build("ppo", whiten_advantages=False, **changes)
    torch.nn.init.constant_(algo.critic.head.bias, value)
    return algo


@pytest.mark.parametrize(
    "gamma, lam, expected",
    [
        (1.0, 1.0, [0.7, 0.7]),  # reward 1 less the value, at either token
        (1.0, 0.0, [0.0, 0.7]),  # one step ahead: V - V, then 1 - V
        (0.5, 1.0, [0.5 - 0.3, 0.7]),  # the reward discounted once
        (0.5, 0.5, [0.15 - 0.3 + 0.25 * 0.7, 0.7]),
    ],
)
def test_with_a_constant_critic_the_credit_is_known(gamma, lam, expected):
    rollouts = two_tokens([1.0])
    (batch,) = prepared(constant_critic(0.3, gamma=gamma, lam=lam), rollouts)
    assert batch.advantages[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert batch.returns[0].tolist() == pytest.approx([a + 0.3 for a in expected], abs=1e-6)
    assert batch.values[0].tolist() == pytest.approx([0.3, 0.3], abs=1e-6)


def test_advantages_are_whitened_over_all_tokens_of_the_step():
    rollouts = recorded_rollouts((3, 4))
    (batch,) = prepared(build("ppo"), rollouts)
    tokens = batch.advantages[batch.response_mask]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-5)
    assert tokens.var().item() == pytest.approx(1, abs=1e-4)


def test_kl_in_the_reward_is_charged_to_the_token_that_strays():
    algo = constant_critic(0.0, kl_coef=0.5, kl_in="reward", kl_estimator="k1", lam=0.0)
    for parameter in algo.frozen["ref"].parameters():
        parameter.data *= 0.8
    rollouts = two_tokens([1.0])
    (batch,) = prepared(algo, rollouts)
    kl = rollouts.scores["old_logprobs"][0] - rollouts.scores["ref_logprobs"][0]
    expected = torch.tensor([0.0, 1.0]) - 0.5 * kl
    torch.testing.assert_close(batch.advantages[0], expected)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_value_is_of_the_state_before_its_token(critic):
    algo = build("ppo", critic=critic)
    torch.nn.init.normal_(algo.critic.head.weight)
    rollouts = two_tokens([1.0])
    values = []
    for last in (6, 7):  # the last token changes no value, the first one changes the second
        rollouts.responses = [torch.tensor([5, last])]
        prepared(algo, rollouts)
        values.append(rollouts.scores["values"][0])
    torch.testing.assert_close(values[0], values[1])
    rollouts.responses = [torch.tensor([8, 6])]
    prepared(algo, rollouts)
    changed = rollouts.scores["values"][0]
    torch.testing.assert_close(changed[0], values[0][0])
    assert abs(changed[1] - values[0][1]) > 1e-3


def test_the_critic_is_no_part_of_the_policy_and_a_shared_one_is_a_head_alone():
    separate, shared = build("ppo"), build("ppo", critic="shared")
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(shared.critic) == make_tiny_model().config.hidden_size + 1
    assert count(separate.critic) > count(shared.critic)
    names = [name for name, _ in separate.named_weights()]
    assert names == [name for name, _ in make_tiny_model().named_parameters()]


def updated(algo: PPO, rollouts: Rollouts) -> dict[str, bool]:
    """Which modules one optimizer step changes."""
    before = {name: p.detach().clone() for name, p in algo.named_parameters()}
    algo.trainer = SimpleNamespace(precision_plugin=Precision(), world_size=1, global_rank=0)
    optimizer = torch.optim.AdamW(algo.parameter_groups(), lr=1e-3)
    rollouts.scores.clear()
    (batch,) = flat(updates_of(rollouts, algo))
    algo.training_step(Update([batch]), 0).backward()
    algo.configure_gradient_clipping(optimizer, gradient_clip_val=1.0)
    optimizer.step()
    changed = {name: not torch.equal(before[name], p) for name, p in algo.named_parameters()}
    parts = ("policy.", "critic.backbone", "critic.head")
    return {part: any(c for name, c in changed.items() if name.startswith(part)) for part in parts}


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_while_the_critic_warms_up_not_a_bit_of_the_policy_moves(critic):
    algo = build("ppo", critic=critic, critic_warmup=4, critic_lr=1e-3)
    rollouts = recorded_rollouts((3, 4))  # of rollout step 3
    assert updated(algo, rollouts)["policy."] is False
    assert updated(algo, rollouts)["critic.head"] is True
    rollouts.rollout_step = 4
    assert updated(algo, rollouts)["policy."] is True


def test_actor_and_critic_are_two_groups_with_their_own_learning_rates():
    algo = build("ppo", critic_lr=0.25)
    algo.optimizer_factory = lambda groups: torch.optim.AdamW(groups, lr=0.5)
    groups = algo.configure_optimizers()["optimizer"].param_groups
    assert [(g["name"], g["lr"]) for g in groups] == [("policy", 0.5), ("critic", 0.25)]
    owned = {id(p) for g in groups for p in g["params"]}
    assert owned == {id(p) for p in algo.parameters()}


def test_each_group_is_clipped_by_its_own_norm():
    algo = build("ppo")
    optimizer = torch.optim.SGD(algo.parameter_groups(), lr=1.0)
    for scale, module in ((1e-3, algo.policy), (10.0, algo.critic)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, scale)
    before = next(algo.policy.parameters()).grad.clone()
    algo.configure_gradient_clipping(optimizer, gradient_clip_val=1.0)
    torch.testing.assert_close(next(algo.policy.parameters()).grad, before)  # already below 1
    norm = torch.stack([p.grad.norm() for p in algo.critic.parameters()]).norm()
    assert norm.item() == pytest.approx(1.0, abs=1e-4)


def test_a_shared_trunk_learns_from_the_critic_and_a_separate_one_does_not():
    rollouts = recorded_rollouts((3, 4))
    grads = {}
    for critic in ("separate", "shared"):
        for value_coef in (1.0, 2.0):
            algo = build("ppo", critic=critic, value_coef=value_coef)
            torch.nn.init.normal_(algo.critic.head.weight)
            gradient(algo, rollouts)
            grads[critic, value_coef] = next(algo.policy.parameters()).grad.clone()
    assert torch.equal(grads["separate", 1.0], grads["separate", 2.0])
    assert not torch.allclose(grads["shared", 1.0], grads["shared", 2.0], rtol=1e-3)


def test_the_critic_regresses_on_its_returns():
    rollouts = recorded_rollouts((3, 4))
    algo = build("ppo", value_clip=None)
    (batch,) = prepared(algo, rollouts)
    metrics = algo.total_loss(algo.forward_scores(batch), batch).metrics
    expected = 0.5 * (batch.weights * (batch.values - batch.returns) ** 2).sum()
    torch.testing.assert_close(metrics["value/loss"], expected)


@pytest.mark.parametrize("clip, judged", [(None, 0.8), (0.5, 2.3), (0.1, 2.7)])
def test_values_far_from_the_old_ones_are_judged_at_the_clip(clip, judged):
    algo = constant_critic(0.8, value_clip=clip)
    (batch,) = prepared(algo, two_tokens([1.0]))
    batch.values, batch.returns = batch.values + 2.0, torch.ones_like(batch.returns)
    loss = algo.auxiliary_loss(algo.forward_scores(batch), batch).loss_sum / batch.weights.sum()
    assert float(loss.detach()) == pytest.approx(0.5 * (judged - 1) ** 2, rel=1e-4)
