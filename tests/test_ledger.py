import time

import pytest

from rlzoo.errors import UserError
from rlzoo.ledger import Ledger, Limits
from rlzoo.rng import STREAMS, response_seed, uniforms


def test_pilots_are_paid_and_validation_is_counted_apart():
    ledger = Ledger()
    ledger.drew("train", [3, 4])
    ledger.drew("pilot", [5])
    ledger.drew("val", [100])
    assert (ledger.responses, ledger.tokens) == (3, 12)
    assert ledger.row()["responses/val"] == 1 and ledger.row()["tokens/val"] == 100


def test_nested_phases_count_a_second_once():
    ledger = Ledger()
    with ledger.phase("outer"):
        time.sleep(0.02)
        with ledger.phase("inner"):
            time.sleep(0.05)
    assert 0.05 <= ledger.phases["inner"] < 0.2
    assert 0.02 <= ledger.phases["outer"]
    assert sum(ledger.phases.values()) <= ledger.seconds


def test_a_resumed_ledger_goes_on_counting():
    ledger, resumed = Ledger(), Ledger()
    ledger.drew("train", [3])
    ledger.updated(None)
    resumed.load_state_dict(ledger.state_dict() | {"seconds": 50.0})
    resumed.drew("train", [4])
    resumed.updated("empty")
    assert (resumed.responses, resumed.updates) == (2, 1)
    assert resumed.counts["skipped/empty"] == 1 and resumed.seconds >= 50


@pytest.mark.parametrize("name", ["max_responses", "max_tokens", "max_updates"])
def test_each_limit_stops_when_it_is_reached_and_not_before(name):
    ledger = Ledger()
    assert ledger.exceeded(Limits(**{name: 2})) is None
    ledger.drew("train", [1])
    ledger.updated(None)
    assert ledger.exceeded(Limits(**{name: 2})) is None
    ledger.drew("pilot", [1])
    ledger.updated(None)
    assert ledger.exceeded(Limits(**{name: 2})) == f"limits.{name}=2"


def test_a_limit_that_never_lets_a_run_start_is_refused():
    with pytest.raises(UserError, match="limits.max_tokens must be positive or null, got 0"):
        Limits(max_tokens=0)


def test_no_two_draws_share_their_noise():
    seeds = [
        response_seed(run, stream, step, round_, prompt, index)
        for run in (0, 1)
        for stream in STREAMS
        for step in (0, 1)
        for round_ in (0, 1)
        for prompt in ("1", "11")
        for index in (0, 1, 11)
    ]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) and max(seeds) < 2**63


def test_the_noise_of_a_response_does_not_depend_on_how_much_is_drawn():
    assert uniforms(7, 100)[:10].tolist() == uniforms(7, 10).tolist()
    assert uniforms(7, 10).tolist() != uniforms(8, 10).tolist()
