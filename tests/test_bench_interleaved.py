"""Benches that time things side by side."""

import pytest

from rlzoo.bench._interleaved import figures, interleaved, ratio
from rlzoo.bench.growth import slopes


def test_each_repeat_calls_all_and_the_order_alternates():
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved(runs, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # a call of each that is not timed, first
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_pairs_of_the_same_repeat():
    found = ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert found == (3.0, 2.0, 4.0)
    assert figures("x", found) == {"x": 3.0, "x_low": 2.0, "x_high": 4.0}


def test_growth_is_the_slope_between_the_two_largest_sizes_in_each_repeat():
    seconds = [[9.0, 9.0], [1.0, 2.0], [10.0, 2.0]]  # of sizes, one a repeat
    assert slopes([1, 10, 100], seconds) == pytest.approx([1.0, 0.0])  # linear, flat
