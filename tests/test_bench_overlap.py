"""What the benches of whole runs make of their rows."""

import pytest

from rlzoo.bench._runs import phases, seconds
from rlzoo.bench.overlap import bound, parts


def test_seconds_are_of_the_rollout_steps_and_of_each_phase():
    row = {"time/sampling/train": "2", "time/scoring": "0.5", "time/training": "1.5"}
    beside = {"time/other": "9", "time/seconds": "40", "time/waiting/ahead": "", "reward": "1"}
    rows = [phases(row | beside)] * 2
    assert rows[0] == {"sampling/train": 2.0, "scoring": 0.5, "training": 1.5}
    assert seconds(rows) == 8.0 and seconds(rows, "scoring", "training") == 4.0
    assert parts(rows) == (2.0, 2.0)


def test_an_epoch_can_win_no_more_than_what_is_drawn_beside_training():
    assert bound(1.0, 1.0, steps=1) == 1.0  # nothing is beside it
    assert bound(1.0, 1.0, steps=3) == pytest.approx(6 / 4)
    assert bound(3.0, 1.0, steps=2) == pytest.approx(8 / 7)  # draw, draw beside, train
    assert bound(1.0, 3.0, steps=2) == pytest.approx(8 / 7)
