"""Answers that mean the same in other spellings, and near ones that do not; each row is one answer
in every way it is written, then what it is not."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo.rewards.base import Verdict
from rlzoo.rewards.boxes import boxed_answer, final_answers, shorten
from rlzoo.rewards.math import verdict
from rlzoo.rewards.spelling import normalise, number

RIGHT, WRONG = Verdict.RIGHT, Verdict.WRONG

# golds / other spellings, all right against each gold / answers that are wrong against each
SAME = [
    (
        [r"28\%", "28%", "28 percent", r"28\text{ per cent}"],
        ["28", "28 pct", "28 percentage", "28 Percent", r"28\ \%", r"28\,\%", r"28\text{\%}",
         "28％"]
        + [r"28\mathrm{\%}", r"28\mbox{ percent}", r"28\text{ percentage points}", "0.28",
           r"\frac{7}{25}"],
        ["2.8", "0.0028", "2800", r"29\%", "0.29"],
    ),
    (["0.28", r"\frac{7}{25}"], [r"28\%", "28 percent", r"28\text{ per cent}"], ["28", r"2.8\%"]),
    ([r"12\frac{1}{2}\%", r"12.5\%"], ["12.5", r"12\frac12\%", "0.125", "1/8"], ["12", r"13\%"]),
    ([r"10\%, 20\%"], [r"10\% \text{ and } 20\%", "10, 20", "0.1, 0.2"], [r"10\%, 21\%"]),
    ([r"5\%", r"x = 5\%"], [r"x=5\%", r"5\% \text{ increase}"], [r"6\%", r"x=6\%"]),
    (
        ["60", r"60^\circ", "60°", r"60 \text{ degrees}"],
        [r"60^{\circ}", r"60\degree", "60 degrees", "60º", r"60^{o}", r"60\text{°}",
         r"60^\circ\text{C}"]
        + [r"\angle A = 60^\circ"],
        [r"61^\circ", "6"],
    ),
    (
        ["15", r"15\text{ cm}", "15 cm", r"15\,\mathrm{cm}^2"],
        [r"15\text{ square units}", "15 dollars", r"15\mathrm{~cm}", r"15\text{ m/s}^2",
         "15 apples"]
        + [r"15\text{ ft}^3", r"15 \text{ kg}\cdot\text{m}", r"15\,\Omega", "15 cm^2",
           r"15^{\text{th}}"]
        + [r"\$15", r"\$15.00", "£15", "15€", r"\text{USD } 15", r"\text{Rs. }15",
           r"15\,\text{s}^{-1}"]
        + ["15 people", r"\text{15 apples}", "15 years old"],
        [r"16\text{ cm}", r"\$16", "16 apples", "1.5"],
    ),
    (
        ["1234", "1,234"],
        ["1{,}234", r"1\,234", "1 234", r"1\ 234", r"1,\!234", r"1,\! 234", "1{,} 234", "1'234",
         "1234.0"]
        + ["+1234", "01234", r"\text{1,234}", r"1.234 \times 10^3", "1.234e3", "1.234E+03",
           r"\num{1234}"],
        ["1235", "234", "235", "1.234", "12 34"],
    ),
    (["1000000"], ["1,000,000", r"1\,000\,000", "1 000 000", "10^6", "1e6"], ["1,000,001"]),
    (["1.22", "1,22"], ["1.220", "1,22"], ["122", "1.23"]),
    (["0.5"], [".5", "0,5", "0.50", "1/2", "½", r"\frac12", r"50\%", "+0.5", "5e-1"],
     ["5", "-0.5"]),
    (["-5"], ["−5", "–5", "-5.0", r"\text{-5}", "－５"], ["5", r"\pm 5"]),
    (
        ["0.000015", "1.5e-05"],
        ["1.5e-5", "15e-6", "1.5E-05", r"1.5 \times 10^{-5}", r"1.5\cdot 10^{-5}", "1.5 × 10⁻⁵"],
        ["0.000016", "1.5e-6", "0", "0.00001", "1.5"],
    ),
    (["1e-7"], ["0.0000001"], ["2e-7", "0.0000002", "0"]),
    (["3e8"], ["300000000", r"3 \times 10^8"], ["3e7"]),
    (
        [r"\frac{3}{4}", "3/4", "0.75"],
        [r"\frac34", r"\dfrac{3}{4}", r"\tfrac34", r"\cfrac{3}{4}", "¾", "3⁄4", r"\nicefrac{3}{4}"]
        + [r"{3 \over 4}", r"\frac{\text{3}}{\text{4}}", "6/8", r"3\div4", r"75\%", "frac{3}{4}"],
        [r"\frac{4}{3}", "0.74", r"\frac{3}{5}"],
    ),
    (
        ["1.5", r"1\frac{1}{2}", "1 1/2"],
        ["3/2", r"1\dfrac12", "1½", "1 ½", r"1\,\frac12", r"1\ \frac{1}{2}"],
        [r"\frac12", "1.2", "11/2"],
    ),
    ([r"\frac13"], [r"0.\overline{3}", r"0.\dot{3}", "0.33333333"], ["0.333", "0.3"]),
    ([r"0.1\overline{6}"], [r"\frac16"], ["0.16"]),
    (["2π", r"2\pi"], ["2pi", "6.283185307"], ["6.28", r"\pi"]),
    ([r"2\sqrt{2}"], ["2√2", r"\sqrt8", "√8", "2*sqrt(2)"], [r"\sqrt2", "2.83"]),
    (["x^2+1"], ["1+x²", "x^{2}+1"], ["x^2", "x+1"]),
    ([r"(-\infty,3)"], ["(-∞,3)", r"(-\infty, 3)"], [r"(-\infty,3]", r"(3,\infty)"]),
    ([r"\infty"], ["∞", "infinity", r"+\infty"], [r"-\infty", "5"]),
    ([r"\emptyset"], [r"\varnothing", "∅"], ["0"]),
    ([r"1-\frac{1}{e}"], [r"1 - \frac{1}{\mathrm{e}}"],
     [r"1+\frac1e", r"1 + \frac{1}{\mathrm{e}}"]),
    (["2+3i", "2+3 i"], [r"2 + 3\mathrm{i}", "3i+2", r"2+3\,i", "z = 2 + 3 i", r"\text{2 + 3i}"],
     ["2-3i", "2"]),
    ([r"\frac{1}{1+i}"], [r"\frac{1-i}{2}", "z=(1 - i)/2"], [r"\frac{1+i}{2}"]),
    (["e^{2 i t}"], ["e^{2it}", "e^{2i t}"], ["e^{2t}", "e^{-2it}"]),
    ([r"(\gamma^2-1)\sin x"], [r"(\gamma^{2} - 1)\cdot\sin x", r"(γ²-1)\sin(x)"],
     [r"(\gamma^2-2)\sin x"]),
    (["1/0"], ["1/0."], ["2/0", "5", "0"]),
    (["12:00"], ["12:00."], ["1:00", "12:01"]),
    (["p - q", "p-q"], ["-q+p", "{p - q}"], ["q - p", "p"]),
    (["a - b - c"], ["a-b-c", "a - c - b"], ["a-b+c"]),
    (["AB - CD"], ["AB-CD", "BA - DC"], ["CD - AB"]),
    (["(1,2]", "{(1,2]}"], [r"\mathbf{{(1, 2]}}"], ["(1,2)"]),
    ([r"\{1,2\}"], ["{1,2}", r"\text{1, 2}", r"1\text{, 2}", r"1\text{ and 2}"],
     ["1", "2", "{1}{2}"]),
    (["12"], ["= 12", "12 = x", "12^{th}", r"\textbf{(D) }12", "(D) 12", r"12 \pmod{15}",
      r"x \equiv 12 \pmod{15}"]
        + [r"12\ (\text{mod } 15)"],
        [r"\text{12 to 15}", r"12\text{ to 15}", r"12\text{ remainder 3}", r"\text{12, 15}",
         r"12\text{, 15}"]
        + [r"12\text{ or more}", "12 or more", r"\textbf{(D) }13", "12, 13",
           r"12\text{ feet 3 inches}"]),
    ([r"\textbf{(D)}\ 12"], ["12", "D", "(D)", r"\textbf{(D) }12"],
     ["C", "13", r"\textbf{(C) }12"]),
    ([r"n \equiv 1 \pmod 3"], [r"1 \pmod{3}", r"n\equiv 1\bmod 3"],
     ["1", r"1 \pmod 4", r"2 \pmod 3"]),
    (["5,000,000", "5 million", r"\$5 \text{ million}"],
     [r"5 \times 10^6", r"5{,}000{,}000\text{ dollars}"]
        + [r"5\text{ million dollars}"], ["5 billion", "5000", "6 million"]),
    (["5"], ["5 million"], ["6 million"]),
    (["(1, 2)"], [r"\bigl(1,2\bigr)", r"\langle 1, 2\rangle", "(1;2)", "(x,y)=(1,2)"],
     ["(2,1)", "[1,2]"]),
    (["13, 14"], [r"13 \text{ and } 14", r"13,\quad 14", "13 or 14", r"x=13 \text{ or } x=14"],
     ["13", "13,15"]),
    (["2,-2"], [r"\pm 2", "±2", r"x=\pm 2", r"\{-2,2\}"], ["2", "-2"]),
    (
        ["B", r"\text{(B)}"],
        ["(B)", "B.", "B)", r"\textbf{(B)}", r"\text{(B) } 5", r"\text{Option B}", "(B) a square"],
        ["C", "(A)", r"\text{(A) } B"],
    ),
    (["Evelyn"], [r"\text{Evelyn}", r"\textbf{Evelyn}", r"\mathbf{Evelyn}", "evelyn"],
     ["nylevE", "Eve"]),
    (["January 5"], [r"\text{January 5}"], ["January 6", "5"]),
    (["101_2"], [r"101_{2}", "101"], ["101_3", "110_2", "5"]),
    (["2ab"], ["2ba", r"2\,ab"], ["2", "2cd", "3ab"]),
    (["2t"], ["2 t", r"2\cdot t"], ["2", "2c", "3t"]),
    (["3:30 PM"], ["3:30 pm", r"3:30\text{ p.m.}", "3:30PM"],
     ["3:30 AM", r"3:30\text{ a.m.}", "3:31 PM"]),
    (
        ["5"],
        [r"\mathbf{5}", r"\boldsymbol{5}", r"\color{red}{5}", r"\textcolor{red}{5}",
         r"\underline{5}"]
        + ["**5**", "`5`", "5.", "5,", "5;", "~5~", r"5\ ", r"\,5\,", "$5$", r"\(5\)", r"\[5\]",
           "５"]
        + [r"\mathtt{5}", r"\text{The answer is } 5", r"\mathbf{x = 5}", r"x \approx 5",
           r"\approx 5"],
        ["> 5", r"\ge 5", "<5", r"\neq 5", "50", r"\text{not } 5 @ 5"],
    ),
]  # fmt: skip


def boxed(answer: str) -> str:
    return rf"Adding up, the answer is $\boxed{{{answer}}}$."


@pytest.mark.parametrize(("golds", "same", "others"), SAME, ids=lambda row: row[0][:20])
def test_every_spelling_is_right_and_near_ones_are_wrong(golds, same, others):
    pairs = [(gold, answer) for gold in golds for answer in dict.fromkeys([*golds, *same])]
    assert [p for p in pairs if verdict(p[0], boxed(p[1])) is not RIGHT] == []
    pairs = list(itertools.product(golds, others))
    assert [p for p in pairs if verdict(p[0], boxed(p[1])) is not WRONG] == []


CONNECTIVES = [
    ", ", " and ", " or ", "; ", ", and ", " $ and $ ", r"\) and \(", r" \text{and} ",
    r"\text{ or }",
    r" \quad \text{and} \quad ", r"\qquad\text{or}\qquad ", r",\quad ", r"\ \text{and}\ ", " & ",
    r" \& ",
    r" \text{, and } ", r" \mbox{ and } ", r" \mathrm{and} ", r" \text{ or } \\ ", r" \land ",
    r"\vee",
    "$ and $x = ", ",\n",
]  # fmt: skip
SPACING = [
    "",
    " ",
    "\n",
    "\n\n",
    r" \, ",
    r" \quad ",
    r" \\ ",
    r" \hspace{1cm} ",
    "\n- ",
    "\n* ",
    "\n2. ",
]
WORDS = [r" \text{ for the first, and } ", " papers and ", " as well as ", r" \text{ or else } "]


@pytest.mark.parametrize("between", CONNECTIVES)
def test_boxes_joined_by_a_connective_are_one_answer(between):
    text = rf"The solutions are $\boxed{{3}}{between}\boxed{{7}}$."
    assert boxed_answer(text) == "3, 7"
    assert [verdict(gold, text) for gold in ("3, 7", "7", "3")] == [RIGHT, WRONG, WRONG]


def test_boxes_near_each_other_are_one_answer_or_the_last_is():
    for between in (*SPACING, *WORDS):
        text = rf"The solutions are $\boxed{{3}}{between}\boxed{{7}}$."
        assert [verdict(gold, text) for gold in ("3, 7", "7", "3")] == [RIGHT, RIGHT, WRONG], (
            between
        )


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        (
            r"$\boxed{1} \quad \text{and} \quad \boxed{2} \quad \text{and} \quad \boxed{3}$",
            ("1, 2, 3",),
        ),
        (", ".join(rf"$\boxed{{{i}}}$" for i in range(1, 8)), ("1, 2, 3, 4, 5, 6, 7",)),
        (r"\boxed{5} and \boxed{5}", ("5",)),
        (r"\boxed{5}. So \boxed{5}", ("5",)),
        (r"\boxed{3}. No, wait, I forgot the factor. It is \boxed{5}", ("5",)),
        (r"\boxed{3}" + " and so on" * 9 + r"\boxed{5}", ("5",)),
        (r"\boxed{1}, \boxed{\boxed{2}}", ("1, 2",)),
        (r"\boxed{x = \boxed{2}}", ("2",)),
        (r"\boxed{5} \boxed{}", ("5",)),
        (r"\boxed{} \boxed{ }", ()),
        (r"\boxed 12 ", ("12",)),
        (r"\boxed5", ("5",)),
        (r"\boxed x", ("x",)),
        (r"\fbox{5} \framebox{6}", ("6", "5, 6")),
        (r"\boxed{4}, then \boxed{5", ("4",)),
        (r"\boxed{5", ()),
        (r"\boxed{28}\%", (r"28\%",)),
        (r"$\boxed{28}$ per cent of them", (r"28\%",)),
        (r"\boxed{28\%} percent", (r"28\%",)),
        (r"\boxed{2}. Final Answer: The final answer is $3$. I hope it is correct.", ("$3$",)),
    ],
)
def test_final_answers_and_the_excerpt_that_still_says_them(text, readings):
    assert final_answers(text) == readings
    assert final_answers(shorten("We think. " * 50 + text)) == readings


def test_without_a_box_percent_in_words_and_letters_of_choices_are_read():
    assert verdict("0.28", "The answer is 28 per cent.") is RIGHT
    assert verdict(r"28\%", "The answer is $28$ percent.") is RIGHT
    assert verdict("B", "The answer is (B).") is RIGHT
    assert verdict("B", r"Therefore the final answer is $\text{(C)}$.") is WRONG


numbers = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000)


@settings(max_examples=100, deadline=None)
@given(numbers, st.sampled_from(["{}", r"{}\text{{ cm}}", "x = {}", r"\mathbf{{{}}}", "$ {} $"]))
def test_a_number_survives_its_dress(value, dress):
    plain = re.sub("^x ?= ?", "", normalise(dress.format(value)))
    assert number(plain) == value
    fraction = rf"{'-' * (value < 0)}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    assert number(normalise(fraction)) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1 2", "1/0", r"\frac{1}{0}", "1,2", "1e999999", "9" * 200]
)
def test_what_is_no_number_is_none(text):
    assert number(text) is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="\\{}[]()$%^_,.;:~&*'\"` 0123456789aepxmd½²√°−５", max_size=40))
def test_any_text_has_a_spelling_and_it_is_stable_in_the_excerpt(text):
    assert isinstance(normalise(text), str)
    assert final_answers(shorten(text)) == final_answers(text)


def test_a_gold_answer_that_does_not_parse_is_met_by_its_text_in_other_spacing():
    gold = r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"
    assert verdict(gold, boxed(r"\dfrac{1}{3}E_1 + \dfrac{2}{3}E_2")) is RIGHT
    assert verdict(gold, boxed(r"\frac{1}{3}E_1+\frac{2}{3}E_1")) is Verdict.UNVERIFIABLE


def test_a_fraction_that_stands_in_a_box_that_does_not_parse_is_no_answer():
    assert verdict(r"\frac{2}{3}", boxed(r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}")) is WRONG
