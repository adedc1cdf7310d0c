"""Settings of a strategy that cannot be, refused before anything is loaded."""

import logging

import pytest

from rlzoo.errors import UserError
from rlzoo.strategies import DeepSpeed, deepspeed

pytestmark = pytest.mark.deepspeed


@pytest.mark.parametrize(
    "options, words",
    [
        ({"stage": 3}, "strategy.options.stage: take strategy.stage"),
        ({"offload_optimizer": {"device": "cpu"}}, "take strategy.offload"),
        ({"reduce_bucket_sise": 100}, "strategy.options.reduce_bucket_sise: DeepSpeed does not"),
        ({"reduce_bucket_size": -1}, "strategy.options.reduce_bucket_size: DeepSpeed does not"),
        ({"overlap_comm": "perhaps"}, "strategy.options.overlap_comm: DeepSpeed does not"),
    ],
)
def test_an_option_that_deepspeed_would_not_take_is_named(options, words):
    with pytest.raises(UserError, match=words):
        DeepSpeed(stage=2, options=options)


def test_others_are_passed_on():
    strategy = DeepSpeed(stage=2, options={"reduce_bucket_size": 1000, "overlap_comm": True})
    assert strategy.config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert strategy.config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_stage_1_keeps_its_own_optimizer():
    assert "data_types" not in DeepSpeed(stage=1).config  # or DeepSpeed takes another one


@pytest.mark.parametrize("why, heard", [("empty", False), ("non_finite", True), (None, True)])
def test_zero_raises_no_alarm_of_an_update_without_anything_to_learn_from(why, heard, monkeypatch):
    monkeypatch.setattr(deepspeed, "last_skip", [why])
    words = (
        "[deepspeed] OVERFLOW! Skipping step. Gradients are non-finite, weights were not updated."
    )
    record = logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, words, None, None)
    assert deepspeed.is_no_false_alarm(record) == heard
