"""One meaning of "right", and rewards of a user's own: what is taken and what is refused."""

import csv
import json
import logging

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from rlzoo.allocators import Dynamic, GVMBudgets
from rlzoo.callbacks.rollout_log import rollout_figures
from rlzoo.data.rollout_files import accepted, write_rollouts
from rlzoo.errors import UserError
from rlzoo.learning.metrics import PassMetrics
from rlzoo.learning.selection import (
    best_and_worst,
    correct,
    mixed_groups,
    solved_groups,
    unsolved_groups,
)
from rlzoo.models.policy import load_tokenizer
from rlzoo.rewards.base import Scores, is_right
from rlzoo.rewards.calling import RewardCaller, make_reward
from rlzoo.types import Prompt
from tests import warm
from tests.recorded import recorded_rollouts
from tests.zoo import build

PROMPTS = [Prompt(id=f"p{i}", question="?", answer="5") for i in range(3)]


@pytest.mark.parametrize(
    ("rewards", "num_right"),
    [
        ([0.2, 0.6], 0),
        ([0.0, 0.5], 0),
        ([0.6, 0.99], 0),
        ([1.0, 0.9], 1),
        ([-1.0, 1.0], 1),
        ([1.0, 1.0], 2),
        ([-1.0, 0.1], 0),
        ([1 - 1e-7, 0.0], 1),
    ],
)
def test_right_is_the_full_reward_wherever_it_is_asked(rewards, num_right, tmp_path):
    rollouts = recorded_rollouts((2,), 0)
    rollouts.rewards[:] = torch.tensor(rewards)
    rollouts.verdicts[:] = 1  # what a verdict says besides has no say
    values, ids = rollouts.rewards, rollouts.group_ids
    gvm, dynamic, passes = GVMBudgets(), Dynamic(), PassMetrics(ks=[2])
    gvm.observe(["p"], [rewards], [1.0])
    dynamic.observe(["p"], [rewards])
    passes.update(values, ids)
    write_rollouts(tmp_path / "step_000000.parquet", rollouts, load_tokenizer("tiny"))
    if num_right:
        assert len(accepted(str(tmp_path), "rollouts")) == num_right
    else:
        with pytest.raises(UserError, match="no right response"):
            accepted(str(tmp_path), "rollouts")

    share = num_right / 2
    assert int(correct(values).sum()) == num_right
    assert build("raft").select(rollouts).sum() == num_right
    assert rollout_figures(rollouts)["accept_rate"] == share
    assert passes.compute()["avg_at_n"] == share
    assert passes.compute()["pass_at_2"] == (num_right > 0)
    assert gvm.accept_rates == {"p": share}
    assert solved_groups(values, ids).all() == (num_right == 2)
    assert unsolved_groups(values, ids).all() == (num_right == 0)
    assert mixed_groups(values, ids).all() == (num_right == 1)
    assert dynamic.done("p") == (num_right == 1)
    assert len(best_and_worst(values, ids)) == (num_right == 1)


def test_nan_is_never_right():
    assert not is_right(float("nan"))
    assert not is_right(torch.tensor([float("nan")])).any()


class Silent:
    """No on_progress, no close, and another dtype."""

    def __init__(self, returned):
        self.returned = returned

    def __call__(self, prompts, texts, truncated):
        return self.returned


def call(returned):
    known = []
    caller = RewardCaller(Silent(returned))
    scores = caller(PROMPTS, ["x"] * 3, [False] * 3, known.append)
    caller.close()
    assert known == [3]
    return scores


@pytest.mark.parametrize(
    "returned",
    [
        [1.0, 0.25, 0.0],
        (1, 0.25, False),
        np.array([1.0, 0.25, 0.0]),
        torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64, requires_grad=True),
        Scores([1.0, 0.25, 0.0], None),
        Scores(torch.tensor([1.0, 0.25, 0.0]), torch.tensor([1, 0, 0])),
    ],
)
def test_any_n_finite_numbers_are_rewards(returned):
    rewards, verdicts = call(returned)
    assert rewards.dtype == torch.float32 and not rewards.requires_grad
    assert rewards.tolist() == [1.0, 0.25, 0.0]
    assert verdicts.dtype == torch.int8 and verdicts.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (None, "NoneType None, the first for prompt p0"),
        ([1.0, 0.0], r"prompt p0; it returned shape \[2\]"),
        (1.0, r"it returned shape \[\]"),
        (torch.zeros(3, 1), r"it returned shape \[3, 1\]"),
        ([1.0, None, 0.0], "None for prompt p1"),
        (["1", "0", "0"], "'1' for prompt p0"),
        ([1.0, 0.0, float("nan")], "gave nan to a response to prompt p2"),
        ([1.0, float("-inf"), 0.0], "gave -inf to a response to prompt p1"),
        ([1.0, 1e300, 0.0], "gave inf to a response to prompt p1"),
        (torch.tensor([1j, 0, 0]), "it returned Tensor"),
        ({"p0": 1.0}, "dict"),
        (Scores(torch.zeros(3), [1, 0]), "3 verdicts"),
        (Scores(torch.zeros(3), [0, 0, 7]), "3 verdicts"),
        (Scores(torch.zeros(3), torch.zeros(3)), "3 verdicts"),
        (Scores(torch.zeros(3), ["wrong"] * 3), "3 verdicts"),
        (Scores([1.0, 0.0], None), r"it returned shape \[2\]"),
    ],
)
def test_what_is_no_reward_is_refused_by_the_names_of_reward_and_prompt(returned, found):
    with pytest.raises(UserError, match=rf"test_base.Silent .*({found})"):
        call(returned)


@pytest.mark.parametrize("reward", [None, "math", Silent, 5])
def test_what_cannot_be_called_is_no_reward(reward):
    with pytest.raises(UserError, match="is not a reward: it must be callable"):
        RewardCaller(reward)


def test_the_verdict_follows_the_reward_and_the_difference_is_said_once(caplog):
    caller = RewardCaller(Silent(Scores([0.9, 1.0, 0.0], [1, 2, 2])))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert caller(PROMPTS, ["x"] * 3, [False] * 3).verdicts.tolist() == [0, 1, 2]
    assert [
        record.message.count("prompt p0 right and gave it 0.9") for record in caplog.records
    ] == [1]


def test_rewards_on_another_scale_are_taken_and_said_once(caplog):
    caller = RewardCaller(Silent([-1.0, 1.0, 80.0]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert caller(PROMPTS, ["x"] * 3, [False] * 3).rewards.tolist() == [-1, 1, 80]
    assert ["gave 80 to a response to prompt p2" in r.message for r in caplog.records] == [True]


def test_a_reward_is_not_called_for_no_responses():
    assert RewardCaller(lambda *_: 1 / 0)([], [], []).rewards.shape == (0,)


def test_the_scale_of_plus_and_minus_one_starts_from_zero_and_one():
    rollouts = recorded_rollouts((2,), 0)
    rollouts.rewards[:] = torch.tensor([1.0, -1.0])
    algo = build("reinforce")
    with pytest.raises(UserError, match=r"reward_scale=plus_minus_one .* has one of -1"):
        algo.shape_rewards(rollouts)


def with_reward(tmp_path, target: str) -> list[str]:
    """The overrides of a small run with a reward of one's own, from a folder of one's own."""
    (tmp_path / "conf" / "reward").mkdir(parents=True)
    (tmp_path / "conf" / "reward" / "mine.yaml").write_text(f"_target_: {target}\n")
    small = [override for override in warm.SMALL if not override.startswith("reward.")]
    return [*small, f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "reward=mine"]


def test_a_whole_run_counts_partial_rewards_as_wrong_everywhere(tmp_path):
    own = with_reward(tmp_path, "tests.rewards.graded.graded")
    limits = ("sampler=gvm", "val_every=1", "limits.max_responses=16")
    warm.passed(tmp_path / "run", *own, *limits, small=False)
    with open(tmp_path / "run" / "metrics.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["reward"]) == pytest.approx(0.4)
    names = ("accept_rate", "pilot/accept_rate", "val/avg_at_2", "val/pass_at_2")
    assert [float(row[name]) for name in names] == [0.0] * 4


def test_a_reward_of_nan_never_trains(tmp_path):
    own = with_reward(tmp_path, "tests.rewards.graded.Nan")
    told = warm.refused(tmp_path / "run", *own, small=False)
    assert "The reward tests.rewards.graded.Nan gave nan to a response to prompt arith" in told


def test_golds_without_sense_are_named_at_start_and_counted_by_step(tmp_path):
    golds = ["t(0,4]" if i % 3 == 0 else str(2 * i) for i in range(24)]
    rows = [{"question": f"What is {i} + {i}?", "answer": gold} for i, gold in enumerate(golds)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [override for override in warm.SMALL if not override.startswith("data.num")]
    own = ("data=jsonl", f"data.path={path}", "data.val_fraction=0.2", "limits.max_responses=16")
    told = " ".join(warm.passed(tmp_path / "run", *small, *own, small=False).split())
    assert "8 of 24 gold answers tried cannot be parsed" in told and "('t(0,4]')" in told
    assert "cannot be parsed: its responses are unverifiable" in told
    with open(tmp_path / "run" / "metrics.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert 0 < float(row["unverifiable/gold"]) == float(row["unverifiable"])


def test_a_function_with_the_arguments_of_another_library_is_refused_by_name():
    node = OmegaConf.create({"_target_": "tests.rewards.graded.of_another_library"})
    with pytest.raises(
        UserError, match=r"of_another_library, which needs prompts, completions\. A"
    ):
        make_reward(node)
