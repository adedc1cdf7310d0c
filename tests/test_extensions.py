"""Algorithms outside the repository, in tests/outside: a class of at most 40 lines and a YAML each,
with which nothing of rlzoo had to be edited, trained as a user would train them."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlzoo.algos import GRPO
from rlzoo.launch.summary import read_metrics
from rlzoo.loop import updates_of
from rlzoo.types import NoSuchScore, Update
from tests import warm
from tests.conftest import make_tiny_model
from tests.recorded import recorded_rollouts
from tests.zoo import build, flat, planned, prepared

OUTSIDE = Path(__file__).parent / "outside"
NAMES = ("taught", "unsure", "extremes")


@pytest.mark.parametrize("name", NAMES)
def test_a_class_of_forty_lines_and_a_file_of_keys_train(name, tmp_path):
    assert len((OUTSIDE / f"{name}.py").read_text().splitlines()) <= 40
    warm.passed(tmp_path, f"algo={name}", f"hydra.searchpath=[file://{OUTSIDE / 'conf'}]")
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if row["num_rollouts"]]
    assert len(rows) == 2 and all(float(row["grad_norm"]) > 0 for row in rows)
    if name == "taught":  # by the initial policy, which the first update leaves
        assert float(rows[-1]["teacher_kl"]) > 0


def test_the_teacher_moves_the_loss_by_its_weight_and_is_not_trained():
    rollouts, losses = recorded_rollouts((3, 4)), []
    for coef in (0.0, 2.0):
        algo = build("taught", teacher=lambda: make_tiny_model(seed=5), teacher_coef=coef)
        (batch,) = prepared(algo, rollouts)
        losses.append(algo.total_loss(algo.forward_scores(batch), batch).metrics)
    apart = losses[1]["teacher_kl"]
    assert apart / batch.weights.sum() > 0.1
    torch.testing.assert_close(losses[1]["loss"] - losses[0]["loss"], 2 * apart)
    assert all(name.startswith("policy.") for name, _ in algo.named_parameters())
    assert not any(p.requires_grad for model in algo.side_models for p in model.parameters())


def test_credit_follows_the_entropy_of_each_token():
    rollouts = recorded_rollouts((3, 4))
    rollouts.rewards[:2] = torch.tensor([1.0, 0.0])
    algo = build("unsure")
    (batch,), (plain,) = (prepared(a, rollouts) for a in (algo, build("grpo")))
    torch.testing.assert_close(batch.entropy, algo.forward_scores(batch)["entropy"].detach())
    assert plain.advantages.any()
    entropy = batch.entropy / batch.entropy[batch.response_mask].mean()
    torch.testing.assert_close(batch.advantages, plain.advantages * entropy)
    assert entropy[batch.response_mask].std() > 0.01


def test_only_the_kept_of_a_group_train_and_they_are_their_own_baseline():
    rollouts = recorded_rollouts((5, 1, 4))
    rollouts.rewards = torch.tensor([0.0, 0.5, 1.0, 0.5, 0.5, 1.0, 0.5, 1.0, 1.0, 0.5])
    (batch,) = planned(build("extremes", keep=2), rollouts)
    (units,) = [build("extremes", keep=2, configure=False).training_units(rollouts)]
    assert sorted(i for unit in units for i in unit) == [0, 2, 5, 7, 9]
    assert int(batch.response_mask.any(1).sum()) == 5
    found = sorted(round(a, 3) for a in batch.advantages[:, 0].tolist())
    assert found == [-0.707, -0.707, 0.0, 0.707, 0.707]


class Undeclared(GRPO):
    """Reads old log-probs, as its loss does, and does not say so."""

    scores = ("entropy",)


class ByEntropy(GRPO):
    credit_scores = ("entropy",)

    def compute_advantages(self, rollouts):
        return [entropy.clone() for entropy in rollouts.scores["entropy"]]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_score_that_is_read_and_was_not_declared_is_an_error_at_any_step(first, updates):
    algo, rollouts = stranger(Undeclared, updates), recorded_rollouts((3, 4))
    rollouts.rollout_step = first
    (batch, *_) = flat(updates_of(rollouts, algo))
    with pytest.raises(NoSuchScore, match="batch.old_logprobs"):
        algo.training_step(Update([batch]), 0)


class Lottery(GRPO):
    """Trains on rollouts that it draws by lot, others each time it is asked."""

    asked = 0

    def select(self, rollouts):
        self.asked += 1
        return torch.arange(len(rollouts)) % 2 == self.asked % 2


def test_selection_is_asked_for_once_and_credit_knows_the_same_rollouts():
    algo, rollouts = stranger(Lottery, 1), recorded_rollouts((3, 4))
    algo.rejected = "drop"
    updates_of(rollouts, algo)
    assert algo.asked == 1 and rollouts.selected.nonzero()[:, 0].tolist() == [1, 3, 5]


def test_what_credit_reads_is_scored_without_being_declared_twice():
    algo, rollouts = stranger(ByEntropy, 2), recorded_rollouts((3, 4))
    rollouts.rollout_step = 1
    (batch, _) = flat(updates_of(rollouts, algo))
    torch.testing.assert_close(batch.advantages, batch.entropy)


def stranger(kind: type[GRPO], updates: int) -> GRPO:
    """An algorithm as a run has it: it scores when it must, not always as in `prepared`."""
    algo = kind(make_tiny_model, lambda p: torch.optim.SGD(p, lr=1.0), updates=updates)
    algo.configure_model()
    plugin = SimpleNamespace(forward_context=contextlib.nullcontext)
    algo.trainer = SimpleNamespace(world_size=1, global_rank=0, precision_plugin=plugin)
    algo.max_logprob_gap = algo.gap_watch.limit = 1e9  # the recorded log-probs are of no engine
    return algo
