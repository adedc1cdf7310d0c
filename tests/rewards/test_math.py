"""Verdicts on single answers, in this process."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from sympy import Interval, Rational, oo

from rlzoo.rewards.base import Verdict
from rlzoo.rewards.latex import parse_in_two_stages
from rlzoo.rewards.math import (
    boxed_answer,
    parse_gold,
    parse_response,
    symbolic_verdict,
    verdict,
)

BENCHMARKS = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"


def boxed(answer: str) -> str:
    return rf"Adding up, the answer is $\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "042"),
        ("27.0", "27"),
        ("27", "27."),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", r"\dfrac12"),
        ("-3./2", "-1.5"),
        ("1,234", "1234"),
        ("1234", r"1\,234"),
        ("1234", "1{,}234"),
        (r"50\%", "50"),
        (r"50\%", "50%"),
        (r"50\%", "0.5"),
        ("50", r"50\%"),
        ("0.5", r"50\%"),
        (r"12.5\%", r"\frac{1}{8}"),
        (r"10\%, 20\%", "0.1, 0.2"),
        (r"\$5", "5"),
        ("5", r"5\text{ cm}"),
        (r"5\text{ cm}", "5"),
        ("5", "x=5"),
        ("(1, 2)", r"\left(1, \frac{4}{2}\right)"),
        ("1, 2", "2, 1"),
        (r"[0, \infty)", r"\left[0,\infty\right)"),
        (r"\text{Evelyn}", "Evelyn"),
        ("Evelyn", r"\text{evelyn}"),
        (r"\textbf{(B)}", "B"),
        ("B", r"\text{(B)}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("so it is $\\boxed{7}$, as was to be shown", "7"),
    ],
)
def test_equal_answers_in_different_spellings_are_right(gold: str, answer: str):
    assert verdict(gold, boxed(answer)) is Verdict.RIGHT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "43"),
        ("1234", "1,235"),
        (r"50\%", "5"),
        ("0.5", "50"),
        ("46", "12 34"),  # math-verify alone adds them up
        ("235", r"1\,234"),
        (r"[0, \infty)", r"(0, \infty)"),
        ("(1, 2)", "(2, 1)"),
        ("Evelyn", "nylevE"),  # math-verify alone multiplies the letters
        (r"\textbf{(B)}", "C"),
        ("42", ""),
        ("42", r"\frac{1}{"),
        ("42", "\0"),
        ("42", "\ud800"),
    ],
)
def test_different_answers_are_wrong(gold: str, answer: str):
    assert verdict(gold, boxed(answer)) is Verdict.WRONG


@pytest.mark.parametrize("gold", ["", "  ", "$$", r"t(0,4]", r"n \equiv\equiv ("])
def test_a_gold_answer_that_does_not_parse_leaves_other_answers_unverifiable(gold: str):
    assert verdict(gold, boxed("5")) is Verdict.UNVERIFIABLE


@pytest.mark.parametrize("gold", [r"t(0,4]", r"n \equiv\equiv (", "np.arcsin(10/13)"])
def test_a_gold_answer_that_does_not_parse_still_verifies_against_itself(gold: str):
    assert verdict(gold, boxed(gold)) is Verdict.RIGHT
    assert verdict(f"${gold}$", boxed(f"  {gold}. ")) is Verdict.RIGHT


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"first \boxed{3}, then \boxed{4", "3"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\frac{1}{2}} of {it}", r"\frac{1}{2}"),
        (r"\boxed{\}", None),
        ("no box", None),
        (r"}}{{ \boxed{5} }{", "5"),
    ],
)
def test_the_last_closed_box_is_the_answer(text: str, answer: str | None):
    assert boxed_answer(text) == answer


def test_a_box_counts_before_anything_said_after_it():
    assert verdict("3", r"The answer is \boxed{3}. Check: the answer is 4.") is Verdict.RIGHT
    assert verdict("4", r"The answer is \boxed{3}. Check: the answer is 4.") is Verdict.WRONG


@pytest.mark.parametrize(
    ("gold", "text"), [("42", "so it is 42."), ("0.5", r"it is 50\%"), ("0.5", r"it is $50\%$")]
)
def test_without_a_box_the_last_number_is_the_answer(gold: str, text: str):
    assert verdict(gold, text) is Verdict.RIGHT
    assert verdict("7", text) is Verdict.WRONG


def test_parsed_answers_are_sympy_expressions():
    assert parse_gold(r"\frac{1}{2}")[0] == Rational(1, 2)
    assert parse_response(boxed(r"[0, \infty)"))[0] == Interval(0, oo)
    assert parse_gold("") == []


integers = st.from_regex(r"-?0{0,2}[0-9]{1,40}", fullmatch=True) | st.integers(-9, 9).map(str)


@settings(max_examples=150, deadline=None)
@given(integers, integers, st.booleans())
def test_the_short_cut_for_integers_agrees_with_math_verify(gold: str, answer: str, same: bool):
    text = boxed(str(int(gold)) if same else answer)
    assert verdict(gold, text) is symbolic_verdict(gold, text)


def benchmark_golds() -> list[str]:
    """Some gold answers of each benchmark, as text."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the shared benchmark files are not on this machine")
    golds = []
    for path in sorted(BENCHMARKS.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        answers = [row["answer"] for row in rows[:: max(1, len(rows) // 40)]]
        golds += [str(a[0] if isinstance(a, list) else a) for a in answers]
    return golds


def test_benchmark_golds_verify_against_themselves_by_math_verify_alone():
    golds = benchmark_golds()
    missed = [g for g in golds if symbolic_verdict(g, boxed(boxed_answer(g) or g)) != 1]
    assert missed == []


def test_parsing_in_two_stages_changes_no_result(monkeypatch: pytest.MonkeyPatch):
    answers = [boxed_answer(gold) or gold for gold in benchmark_golds()]
    expected = [parse_response(boxed(answer)) for answer in answers]
    monkeypatch.setattr(_Latex2Sympy, "create_parser", _Latex2Sympy.create_parser)  # undone after
    parse_in_two_stages()
    assert [parse_response(boxed(answer)) for answer in answers] == expected
