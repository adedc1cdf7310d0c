import time

import pytest

from rlzoo.bench.resume import seconds_of
from rlzoo.report.ledger import Ledger, Limits
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


def test_every_second_is_in_one_phase_or_in_other_and_a_stream_has_its_own():
    ledger = Ledger()
    with ledger.phase("planning"):
        with ledger.phase("sampling/pilot"):
            time.sleep(0.03)
        time.sleep(0.01)
    with ledger.phase("verifying/pilot"), ledger.phase("sampling/train"):
        time.sleep(0.01)
        spent = ledger.spent()  # a phase in progress counts too
    row = ledger.row()
    times = {name: v for name, v in row.items() if name.startswith("time/")}
    assert times.pop("time/seconds") == pytest.approx(sum(times.values()), abs=1e-9)
    assert times.keys() == {f"time/{name}" for name in (*ledger.phases, "other")}
    assert spent["sampling/pilot"] >= 0.03 and spent["sampling/train"] >= 0.01
    assert sum(spent.values()) <= ledger.seconds
    pilots = row["time/sampling/pilot"] + row["time/verifying/pilot"]
    assert ledger.share("pilot") == pytest.approx(pilots / ledger.seconds, rel=0.01)
    assert ledger.share("planning") < ledger.share("pilot")


def test_seconds_of_a_checkpoint_from_before_streams_had_phases_are_kept():
    ledger = Ledger()
    phases = {"sampling": 30.0, "training": 5.0}
    ledger.load_state_dict({"counts": {}, "phases": phases, "seconds": 40.0})
    with ledger.phase("sampling/train"):
        time.sleep(0.01)
    spent = ledger.spent()
    assert spent["sampling"] == 30 and spent["sampling/train"] >= 0.01
    assert sum(spent.values()) == pytest.approx(ledger.seconds, abs=0.01)
    assert spent["other"] == pytest.approx(5, abs=0.01)


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


def test_the_resume_bench_adds_up_seconds_and_no_counts():
    row = {
        "time/planning": "0.5",
        "time/sampling/pilot": "0.25",
        "tokens/pilot": "735",
        "time/x": "",
    }
    assert seconds_of(row, "planning") == 0.75
