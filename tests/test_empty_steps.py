"""A rollout step with nothing to train on is booked and skipped, and the run goes on: every
algorithm, nothing right, everything right, nothing drawn."""

import dataclasses
import json

import pyarrow.parquet
import pytest
import torch

from rlzoo.algos import PolicyAlgorithm
from rlzoo.errors import UserError
from rlzoo.launch.summary import read_metrics
from rlzoo.learning.losses import LossOutput
from rlzoo.learning.optimization import clip_limit, skip_reason
from rlzoo.loop import updates_of
from rlzoo.types import NoSuchScore, Rollouts, Update
from tests import warm
from tests.recorded import recorded_rollouts
from tests.zoo import NAMES, build, flat, prepared


def nothing_drawn() -> Rollouts:
    return dataclasses.replace(
        recorded_rollouts((1,)),
        prompts=[],
        group_ids=torch.zeros(0, dtype=torch.long),
        responses=[],
        sampler_logprobs=[],
        truncated=torch.zeros(0, dtype=torch.bool),
        rewards=torch.zeros(0),
        verdicts=torch.zeros(0, dtype=torch.int8),
    )


def filled(reward: float, truncated: bool = False) -> Rollouts:
    rollouts = recorded_rollouts((1, 3))
    rollouts.rewards.fill_(reward)
    rollouts.truncated.fill_(truncated)
    return rollouts


STEPS = {
    "nothing drawn": nothing_drawn,
    "nothing right": lambda: filled(0.0),
    "everything right": lambda: filled(1.0),
    "everything truncated": lambda: filled(1.0, truncated=True),
}
KL_IN_REWARD = {"kl_coef": 0.2, "kl_in": "reward"}
VARIANTS = [{}, {"kl_coef": 0.2, "tis_cap": 2.0}, {"entropy_coef": 0.1, "updates": 2, "passes": 2}]
VARIANTS += [KL_IN_REWARD, {"overlong_filter": True, "rejected": "drop"}]
PPOS = [{"critic": "shared"}, {"critic_warmup": 9}, {"whiten_advantages": False} | KL_IN_REWARD]


def built(name: str, changes: dict) -> PolicyAlgorithm | None:
    """None where the algorithm has no place for these options."""
    try:
        return build(name, max_logprob_gap=1e9, **changes)
    except UserError:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_any_step_is_prepared_and_trained_on_without_a_fault(name):
    """Its microbatches are as many as ever, its losses finite, in the first step and later."""
    for changes in VARIANTS + (PPOS if name == "ppo" else []):
        algo = built(name, changes)
        for rollout_step in ((3,) if changes else (0, 3)) if algo else ():
            for what, made in STEPS.items():
                if what == "everything truncated" and not algo.overlong_filter:
                    continue
                rollouts = made()
                rollouts.rollout_step = rollout_step
                batches = prepared(algo, rollouts)
                assert len(batches) == algo.updates_per_step, what
                for batch in batches:
                    algo.zero_grad()
                    algo.training_step(Update([batch]), 0).backward()
                    grads = [p.grad for p in algo.parameters() if p.grad is not None]
                    assert all(grad.isfinite().all() for grad in grads), (changes, what)
                    if what == "nothing drawn":
                        assert batch.divisor == 0 and not any(grad.any() for grad in grads)


def test_an_update_whose_gradient_is_zero_is_empty():
    """A reward that never differs gives GRPO advantages of 0: Adam's momentum must not move it."""
    assert skip_reason(0.0, 12.0) == skip_reason(1.0, 0.0) == "empty"
    assert skip_reason(1e-30, 12.0) is None


def test_an_empty_update_between_two_that_are_not_finite_does_not_keep_the_run_alive():
    algo = build("raft", max_skipped_updates=1)
    assert algo.settle_update({"policy": float("nan")}) == "non_finite"
    assert algo.settle_update({"policy": 0.0}) == "empty"
    with pytest.raises(UserError, match="2 updates in a row had a gradient that is not finite"):
        algo.settle_update({"policy": float("inf")})


def test_many_empty_updates_in_a_row_are_said_ever_more_rarely(caplog):
    """With limits.max_updates alone such a run would go on for ever without a word."""
    algo = build("raft")
    for _ in range(45):
        algo.settle_update({"policy": 0.0})
    said = [r.getMessage().split()[0] for r in caplog.records if "nothing to learn" in r.message]
    assert said == ["10", "20", "40"]
    algo.settle_update({"policy": 1.0})
    assert algo.update_watch.empty_in_a_row == 0


def test_on_a_first_step_without_anything_to_train_on_engine_and_trainer_are_compared():
    algo = build("raft", max_logprob_gap=0.1)
    rollouts = filled(0.0)
    rollouts.rollout_step = 0
    rollouts.sampler_logprobs = [torch.full_like(x, -50.0) for x in rollouts.sampler_logprobs]
    with pytest.raises(UserError, match="max_logprob_gap"):
        prepared(algo, rollouts)


@pytest.mark.parametrize(
    "value, limit", [(1.5, 1.5), (0, torch.inf), (None, torch.inf), (-1, torch.inf)]
)
def test_gradients_are_clipped_by_a_limit_above_zero_alone(value, limit):
    assert clip_limit(value) == limit


def test_another_way_of_clipping_is_refused():
    assert clip_limit(1.0, "norm") == 1.0
    with pytest.raises(UserError, match="gradient_clip_algorithm=value"):
        clip_limit(1.0, "value")


# --- scores that an algorithm declares ------------------------------------------------------


class Taught(type(build("raft", configure=False))):
    """RAFT towards a teacher: a score of its own."""

    scores = ("teacher_logprobs",)

    def score_batch(self, batch):
        return {"teacher_logprobs": torch.where(batch.response_mask, -2.0, 0.0)}

    def policy_loss(self, logprobs, batch):
        loss_sum, metrics = super().policy_loss(logprobs, batch)
        apart = (batch.weights * (logprobs - batch.teacher_logprobs)).sum()
        return LossOutput(loss_sum + apart, metrics | {"apart": apart})


def test_a_loss_may_bring_a_score_of_its_own():
    algo = build("raft")
    algo.__class__ = Taught
    batches = prepared(algo, recorded_rollouts((3, 4)))
    del algo.must_score_old  # one update: no old log-probs, the teacher's all the same
    for batch in [*batches, *flat(updates_of(recorded_rollouts((3, 4)), algo))]:
        assert (batch.teacher_logprobs[batch.response_mask] == -2).all()
        assert batch.to("cpu").teacher_logprobs.shape == batch.response_mask.shape
        assert algo.total_loss(algo.forward_scores(batch), batch).metrics["apart"] != 0


def test_a_score_that_is_declared_and_that_nothing_computes_is_named():
    algo = build("raft")
    algo.scores = ("mentor_logprobs",)
    with pytest.raises(NoSuchScore, match="score mentor_logprobs is declared.*At hand: .*entropy"):
        prepared(algo, recorded_rollouts((3, 4)))


def test_a_score_that_nothing_computed_is_an_error_to_read():
    """It was 0 for every token: a log-prob of 1."""
    (batch,) = prepared(build("grpo"), recorded_rollouts((3, 4)))
    with pytest.raises(NoSuchScore, match="batch.ref_logprobs.*old_logprobs.*kl_coef"):
        batch.ref_logprobs  # noqa: B018
    assert not hasattr(batch, "values") and hasattr(batch, "old_logprobs")


# --- whole runs -----------------------------------------------------------------------------

WRONG = ("reward._target_=tests.constant_reward.Constant",)
RIGHT = (*WRONG, "+reward.value=1.0")


def skipped(run_dir) -> tuple[int, int]:
    """Updates made, and updates skipped since there was nothing to train on."""
    ledger = json.loads((run_dir / "summary.json").read_text())["ledger"]
    return ledger["updates"], ledger.get("skipped/empty", 0)


@pytest.mark.parametrize(
    "options",
    [
        ("algo=raft", *WRONG, "algo.updates=5"),  # nothing selected
        ("algo=grpo", *RIGHT),  # no group with contrast
        ("algo=iterative_dpo", "algo.passes=1", *WRONG),  # no pair
    ],
)
def test_a_run_with_nothing_to_learn_ends_and_leaves_the_policy_as_it_was(options, tmp_path):
    output = " ".join(warm.passed(tmp_path, *options).split())
    assert "Nothing was learnt: every update was skipped" in output
    many = "algo.updates=5" in options
    assert ("10 updates in a row had nothing to learn from" in output) == many
    assert skipped(tmp_path) == (0, 10 if many else 4)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["rollout_step"] for row in rows if row["num_rollouts"]] == ["1", "2"]
    assert {row["lr"] for row in rows if row["lr"]} == {"0.0"}  # the schedule stands at its start
    assert len(list((tmp_path / "rollouts").glob("*.parquet"))) == 2


def test_steps_in_which_nothing_is_drawn_are_booked_and_a_resume_goes_on(tmp_path):
    """One prompt has more than a step's responses, so the steps after it draw none."""
    options = ("algo=ppo", "algo.kl_coef=0.1", "algo.kl_in=reward")
    options += ("sampler=gvm", "sampler.allocator.n_max=null", "sampler.callback.pilots=1")
    options += ("datamodule.responses_per_step=4", "datamodule.responses_per_prompt=2")
    options += ("reward._target_=tests.constant_reward.OneRight", "limits.max_responses=null")
    warm.passed(tmp_path, *options, "limits.max_updates=1")
    warm.passed(tmp_path, *options, "limits.max_updates=3", "ckpt_path=last")
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if row["num_rollouts"]]
    drawn = [int(row["num_rollouts"]) for row in rows]
    assert 0 in drawn and drawn[0] > 4
    files = sorted((tmp_path / "rollouts").glob("*.parquet"))
    assert [pyarrow.parquet.read_metadata(file).num_rows for file in files] == drawn
    assert skipped(tmp_path)[1] >= 2
