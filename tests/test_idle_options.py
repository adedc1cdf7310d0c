"""Every key of an algorithm acts, or is refused with a word: a walk over all of conf/algo."""

import dataclasses
import functools

import pytest
import torch

from rlzoo.algos import PolicyAlgorithm
from rlzoo.errors import UserError
from rlzoo.types import Rollouts, Update
from tests import warm
from tests.recorded import recorded_rollouts
from tests.zoo import NAMES, build, gradient, options_of, prepared

OTHER = {  # another valid value of each key; where the default is one of two, the other one
    "updates": 2,
    "passes": 2,
    "aggregation": "seq_mean_token_sum",
    "kl_coef": 0.3,
    "entropy_coef": 0.1,
    "old_logprobs": "engine",
    "tis_cap": 1.1,
    "overlong_buffer": 0.5,
    "overlong_penalty": 0.5,
    "overlong_filter": True,
    "kl_estimator": "k2",
    "kl_in": "reward",
    "temperature": 0.7,
    "max_response_tokens": 24,
    "tokens_per_microbatch": 40,
    "max_logprob_gap": 1e-6,
    "max_skipped_updates": 3,
    "seed": 5,
    "clip_low": 0.5,
    "clip_high": 2.5,
    "dual_clip": 1.05,
    "singleton": "reward",
    "group_size": 2,
    "critic": "shared",
    "critic_lr": 0.5,
    "critic_warmup": 9,
    "gamma": 0.5,
    "lam": 0.5,
    "value_coef": 0.5,
    "beta": 0.3,
    "label_smoothing": 0.2,
    "loss": "ipo",
    "nll_coef": 0.5,
    "reference": "initial",
}
PAIRS = {
    "rejected": ("drop", "zero"),
    "reward_scale": ("zero_one", "plus_minus_one"),
    "baseline": ("none", "mean"),
}
ACT_ELSEWHERE = {  # of what they do there is a test: where the value must be found
    "max_skipped_updates": "tests/test_updates.py",
    "max_logprob_gap": "tests/test_gradients.py",
    "value_clip": "tests/test_ppo.py",
}
SHARED = 2  # updates, for keys that act on how rollouts are dealt out


def step() -> Rollouts:
    """Groups of all kinds: mixed, of three rewards, all right, all wrong, of one, truncated."""
    rollouts = recorded_rollouts((4, 3, 2, 2, 1, 3, 2, 2), longest=12)
    rewards = [1.0, 0.0, 0.0, 1.0, 0.6, 0.2, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    rollouts.rewards = torch.tensor([*rewards, 0.0, 1.0, 0.6, 0.0, 1.0, 1.0, 0.0])
    rollouts.truncated[[0, 3, 4, 9, 13, 17]] = True
    for i, length in {0: 12, 1: 9, 4: 9, 12: 11}.items():
        rollouts.responses[i] = rollouts.responses[i].repeat(12)[:length]
        rollouts.sampler_logprobs[i] = torch.full((length,), -1.0)
    return rollouts


def effects(algo: PolicyAlgorithm) -> list[torch.Tensor]:
    """All that an option could change of an update: gradient, dealing, rates, what is frozen."""
    for reference in algo.side_models:
        for parameter in reference.parameters():
            parameter.data *= 0.8
    if getattr(algo, "critic", None) is not None:
        torch.nn.init.normal_(algo.critic.head.weight, generator=torch.Generator().manual_seed(0))
    found = gradient(algo, step(), drift=1.5)
    batches = prepared(algo, step())
    algo.training_step(Update([batches[0]]), 0)
    schedule = [len(batches)]
    rates = [group.get("lr", 0.0) for group in algo.parameter_groups()]
    dealt = torch.cat([batch.weights.flatten() for batch in batches])
    order = torch.cat([batch.input_ids.flatten() for batch in batches]).float()
    numbers = [*map(float, schedule), *rates, float(len(algo.frozen_groups))]
    return [found, dealt, order, torch.tensor(numbers)]


@functools.cache
def usual(name: str, updates: int) -> list[torch.Tensor]:
    return effects(build(name, updates=updates))


def differ(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return any(
        a.shape != b.shape or (a - b).abs().max() > 1e-5 * (1e-3 + b.abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )


def other(key: str, value: object) -> object:
    if key in PAIRS:
        return next(choice for choice in PAIRS[key] if choice != value)
    return not value if isinstance(value, bool) else OTHER[key]


@pytest.mark.parametrize("name", NAMES)
def test_every_key_changes_the_update_or_is_refused(name):
    """Or is idle by another key: then the start refuses it where the user has set it."""
    silent = []
    for key, value in options_of(name).items():
        if key == "_target_" or key in ACT_ELSEWHERE:
            continue
        updates = SHARED if key == "seed" else 1
        try:
            algo = build(name, **{"updates": updates, key: other(key, value)})
        except UserError as refusal:
            assert f"algo.{key}" in str(refusal), (key, refusal)
            continue
        found = effects(algo)
        if not differ(found, usual(name, updates)) and f"algo.{key}" not in algo.idle_options():
            silent.append(key)
    assert not silent


@pytest.mark.parametrize(
    "name, options, key",
    [
        ("iterative_dpo", {"tis_cap": 2.0}, "tis_cap"),
        ("iterative_dpo", {"rejected": "zero"}, "rejected"),
        ("iterative_dpo", {"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ("iterative_dpo", {"reward_scale": "plus_minus_one"}, "reward_scale"),
        ("raft", {"reward_scale": "plus_minus_one"}, "reward_scale"),
        ("raft_pp", {"reward_scale": "plus_minus_one"}, "reward_scale"),
        ("reinforce_rej", {"drop_solved": True}, "drop_solved"),
        ("reinforce_rej", {"drop_unsolved": True}, "drop_unsolved"),
        ("reinforce", {"baseline": "mean", "rejected": "zero", "drop_solved": True}, "drop_solved"),
        ("grpo", {"mixed_groups_only": True}, "mixed_groups_only"),
        ("dapo", {"singleton": "reward"}, "singleton"),
        ("grpo", {"overlong_penalty": 0.5}, "overlong_penalty"),
        ("dapo", {"overlong_penalty": 0.0}, "overlong_buffer"),
        ("grpo", {"kl_estimator": "k2"}, "kl_estimator"),
        ("grpo", {"kl_in": "reward"}, "kl_in"),
    ],
)
def test_a_value_that_could_not_act_is_refused(name, options, key):
    with pytest.raises(UserError, match=f"algo.{key}=.* would do nothing"):
        build(name, configure=False, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (("algo=grpo", "algo.rejected=drop"), "algo.rejected=drop would do nothing"),
        (("algo=raft_pp", "algo.clip_low=0.1"), "algo.clip_low=0.1 would do nothing"),
        (("algo=grpo", "algo.reward_scale=plus_minus_one"), "standardised"),
        (("algo=raft", "algo.max_response_tokens=64"), "datamodule.max_response_tokens"),
        (("algo=grpo", "algo.group_size=8"), "algo.group_size=8 would do nothing"),
        (("algo=grpo", "algo.temperature=0.5"), "datamodule.temperature=1.0"),
        (
            ("algo=grpo", "datamodule.responses_per_prompt=1", "datamodule.responses_per_step=8"),
            "GRPO compares the responses of a prompt",
        ),
        (
            (
                "algo=dapo",
                "sampler=dynamic",
                "datamodule.responses_per_prompt=1",
                "datamodule.responses_per_step=8",
            ),
            "responses_per_prompt=1",
        ),
        (
            (
                "algo=rloo",
                "sampler=gvm",
                "sampler.allocator.n_max=1",
                "datamodule.responses_per_prompt=1",
                "datamodule.responses_per_step=8",
            ),
            "n_max",
        ),
        (("algo=raft", "sampler=gvm", "sampler.allocator.n_min=5"), "n_min=5 is too large"),
        (("algo=raft", "sampler=gvm", "sampler.allocator.n_max=3"), "n_max=3 is too small"),
    ],
)
def test_what_cannot_act_together_is_refused_at_start_up(options, message, tmp_path):
    """Before anything is drawn: no pilot has been paid for."""
    assert message in warm.refused(tmp_path, *options)
    assert not (tmp_path / "rollouts").exists() and not (tmp_path / "budgets").exists()


def test_a_clip_that_one_update_makes_idle_is_said(tmp_path):
    options = ("algo=grpo", "algo.updates=1", "algo.clip_high=0.28", "limits.max_responses=16")
    assert "algo.clip_high=0.28 does nothing: " in warm.passed(tmp_path, *options)


def test_single_groups_are_said_once_and_counted(caplog):
    algo = build("grpo", max_logprob_gap=1e9)
    for _ in range(2):
        prepared(algo, recorded_rollouts((3, 1, 1)))
    said = [record.message for record in caplog.records if "have one response" in record.message]
    assert len(said) == 1 and said[0].startswith("2 of 3 prompts")
    quiet = build("grpo", singleton="reward", max_logprob_gap=1e9)
    caplog.clear()
    prepared(quiet, recorded_rollouts((3, 1)))
    assert not caplog.records


def test_a_reward_alone_makes_a_group_of_one_teach():
    """What `smallest_group` says is true: groups below it give no gradient, others do."""
    for name in NAMES:
        algo = build(name, overlong_buffer=0.0) if name == "dapo" else build(name)
        single = dataclasses.replace(recorded_rollouts((1, 1)), rewards=torch.tensor([1.0, 1.0]))
        teaches = bool(gradient(algo, single, drift=0.0).any())
        expected = algo.smallest_group == 1 and name != "reinforce_no_all_correct"
        assert teaches == (expected), name
