"""The law of the loss: an optimizer step's gradient is one weighted mean, however it is split."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from rlzoo.algos import GRPO, RAFT, PolicyAlgorithm, ReinforceRej
from rlzoo.errors import UserError
from rlzoo.learning.microbatching import AGGREGATIONS
from rlzoo.loop import updates_of
from rlzoo.models.logprobs import response_scores
from rlzoo.types import RolloutBatch, Rollouts, Update
from tests.conftest import make_tiny_model
from tests.recorded import recorded_rollouts
from tests.zoo import flat, planned


def algorithm(kind: type[PolicyAlgorithm] = GRPO, **options: object) -> PolicyAlgorithm:
    made = kind(
        policy=make_tiny_model,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        max_response_tokens=9,
        **options,
    )
    made.configure_model()
    return made


def gradient(
    algo: PolicyAlgorithm,
    rollouts: Rollouts,
    parts: int = 1,
    world_size: int = 1,
    extra_padding: int = 0,
) -> torch.Tensor:
    """The averaged gradient, all parameters in one vector, as a strategy would arrive at it."""
    algo.policy.zero_grad()
    for rank in range(world_size):
        for batch in planned(algo, rollouts, parts, rank, world_size):
            if extra_padding:
                for name in ("input_ids", "response_ids", "response_mask", "weights", "advantages"):
                    tensor = getattr(batch, name)
                    padding = tensor.new_zeros(tensor.shape[0], extra_padding)
                    setattr(batch, name, torch.cat([tensor, padding], dim=1))
            scores = response_scores(algo.policy, batch, algo.temperature)
            # Off the policy a little, so that clipping acts, and the same however it is split.
            batch.old_logprobs = scores.logprobs.detach() + 0.3 * torch.sin(
                7 * scores.logprobs.detach()
            )
            loss = algo.policy_loss(scores.logprobs, batch).loss_sum
            (loss / max(batch.divisor, 1e-9)).backward()
    return torch.cat([p.grad.flatten() for p in algo.policy.parameters()])


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 1e-3
    assert (actual - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("parts, world_size", [(2, 1), (1, 2), (3, 2), (4, 4)])
def test_gradient_does_not_depend_on_microbatches_or_ranks(aggregation, parts, world_size):
    rollouts = recorded_rollouts()  # 8 rollouts: (4, 4) leaves microbatches empty
    algo = algorithm(aggregation=aggregation)
    assert_same(gradient(algo, rollouts, parts, world_size), gradient(algo, rollouts))


def test_gradient_does_not_depend_on_padding_columns():
    algo, rollouts = algorithm(), recorded_rollouts()
    assert_same(gradient(algo, rollouts, extra_padding=5), gradient(algo, rollouts))


def test_gradient_does_not_depend_on_the_order_of_rollouts():
    algo, rollouts = algorithm(), recorded_rollouts()
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = dataclasses.replace(
        rollouts,
        group_ids=rollouts.group_ids[order],
        responses=[rollouts.responses[i] for i in order],
        sampler_logprobs=[rollouts.sampler_logprobs[i] for i in order],
        rewards=rollouts.rewards[order],
    )
    assert_same(gradient(algo, shuffled), gradient(algo, rollouts))


def test_one_sgd_step_at_lr_1_is_the_same_on_one_and_on_four_ranks():
    rollouts = recorded_rollouts()
    stepped = []
    for world_size in (1, 4):
        algo = algorithm()
        before = copy.deepcopy(algo.policy.state_dict())
        gradient(algo, rollouts, parts=2, world_size=world_size)
        torch.optim.SGD(algo.policy.parameters(), lr=1.0).step()
        after = algo.policy.state_dict()
        stepped.append(torch.cat([(after[k] - before[k]).flatten() for k in before]))
    assert_same(stepped[1], stepped[0])


def test_an_empty_selection_trains_an_empty_microbatch_with_zero_gradient():
    rollouts = recorded_rollouts()
    rollouts.rewards.zero_()
    algo = algorithm(RAFT, rejected="drop")
    (batch,) = planned(algo, rollouts)
    assert batch.divisor == 0
    loss = algo.policy_loss(algo.forward_scores(batch)["logprobs"], batch).loss_sum
    loss.backward()
    grads = [p.grad for p in algo.policy.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_rejected_rollouts_leave_the_denominator_or_stay_in_it():
    rollouts = recorded_rollouts()
    dropped, kept = (planned(algorithm(RAFT, rejected=r), rollouts)[0] for r in ("drop", "zero"))
    right = rollouts.rewards > 0
    assert dropped.divisor == rollouts.lengths[right].sum()
    assert kept.divisor == rollouts.lengths.sum()


def test_reinforce_rej_credits_wrong_rollouts_with_minus_one():
    rollouts = recorded_rollouts()
    algo = algorithm(ReinforceRej, reward_scale="plus_minus_one", rejected="drop")
    (batch,) = planned(algo, rollouts)
    assert set(batch.advantages[batch.response_mask].tolist()) == {-1.0, 1.0}


def test_every_update_gets_the_same_number_of_rollouts():
    algo, rollouts = algorithm(updates=4, tokens_per_microbatch=20), recorded_rollouts((5, 4, 3))
    units, credit = algo.training_units(rollouts), algo.credit(rollouts)
    updates = algo.plan_updates(rollouts, units, credit)
    assert [update.last for update in updates] == [False] * 3 + [True]
    assert [update.place for update in updates] == [0, 1, 2, 3]
    assert max(len(update.microbatches) for update in updates) > 1
    for update in updates:
        assert sum(int(b.response_mask.any(1).sum()) for b in update.microbatches) == 3


def prepared(algo: PolicyAlgorithm, rollouts: Rollouts) -> list[RolloutBatch]:
    algo.trainer = SimpleNamespace(world_size=1, global_rank=0, precision_plugin=Precision())
    return flat(updates_of(rollouts, algo))


def test_a_gap_between_engine_and_trainer_over_the_limit_stops_the_first_step_alone():
    algo = algorithm(max_logprob_gap=0.1, updates=2)
    first = dataclasses.replace(recorded_rollouts(), rollout_step=0)
    with pytest.raises(UserError, match="algo.max_logprob_gap=0.1"):
        prepared(algo, first)  # recorded log-probs are -1 throughout
    prepared(algo, recorded_rollouts())  # a later step is logged, not stopped
    assert algo.gap()["logprob_gap/mean"] > 0.1
    prepared(algo, dataclasses.replace(first, replayed=True))  # of other weights, as it may be


def test_the_reference_is_no_parameter_and_its_kl_is_zero_at_the_start():
    algo = algorithm(kl_coef=0.1, updates=2)
    names = [name for name, _ in algo.named_parameters()]
    assert names and all(name.startswith("policy.") for name in names)
    for batch in prepared(algo, recorded_rollouts()):
        assert batch.old_logprobs.any()
        torch.testing.assert_close(batch.ref_logprobs, batch.old_logprobs)


def test_the_gap_is_known_with_one_update_a_step_too():
    algo = algorithm()
    (batch,) = prepared(algo, recorded_rollouts())
    assert algo.gap() == {}
    algo.training_step(Update([batch]), 0)
    assert algo.gap()["logprob_gap/max"] > 0.1


def test_scores_do_not_depend_on_how_rollouts_are_chunked():
    scores = []
    for limit in (10_000, 20):
        algo = algorithm(tokens_per_microbatch=limit, updates=2)
        rollouts = recorded_rollouts()
        prepared(algo, rollouts)
        scores.append(torch.cat(rollouts.scores["old_logprobs"]))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)
    assert len(scores[0]) == recorded_rollouts().lengths.sum()
