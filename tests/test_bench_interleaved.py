"""Benches that time things side by side."""

from rlzoo.bench._interleaved import figures, interleaved, ratio


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
