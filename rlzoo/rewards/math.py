"""What a response's final answer is worth against a gold answer, by math-verify.

Pure functions without any limit of time or memory: math-verify's own time-outs are off, since they
need the main thread and whole seconds. Text from a model goes through
`rlzoo.rewards.verifier.VerifierPool`, which runs `verdict` in workers that it can kill.
What is judged otherwise than by math-verify alone, and why: docs/verifier.md.
"""

from __future__ import annotations

import re
from functools import lru_cache

from latex2sympy2_extended.latex2sympy2 import convert_to_pct
from latex2sympy2_extended.sets import FiniteSet
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, MatrixBase, Tuple

from rlzoo.rewards.base import Verdict
from rlzoo.rewards.boxes import boxed_answer, final_answers
from rlzoo.rewards.spelling import normalise, number

Parsed = list[Basic | MatrixBase | str]  # math-verify's: the expression, then its text

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
_TARGETS = (_LATEX, ExprExtractionConfig())

_CLOSE = 0.01  # relative; math-verify rounds to six places, which tells 1e-7 from nothing else
_BASE = re.compile(r"([0-9A-F]+)_\{?(\d+)\}?")
_RELATION = re.compile(r"(?:[<>]=?|\\(?:[lg](?:eq?|t)|neq?)(?![a-z]))\s*")
_NOON = re.compile(r"\b([ap])\.?\s?m\b", re.IGNORECASE)
_TERM = re.compile(r"-?[0-9.]+ ?([a-z]{1,2})")
_UNITS = frozenset(
    "m s g h l cm mm km dm kg mg gm ft lb in yd mi hr am pm th st nd rd ml cc".split()
)
_LETTER = r"\(?[A-J]\)?"
_CHOICE = re.compile(
    r"(?:\\text\w*\s*\{\s*)?(?i:option |choice )?\(?([A-J])(?:\)?\.?|[).:}]+ ?.+)", re.DOTALL
)
_SAID_CHOICE = re.compile(
    r"(?i:answer)(?i:\s+is)?[:\s*$]{1,5}(?:\\text\w*\{)?\(?([A-J])\)?(?![A-Za-z0-9'])"
)
_COMMA = re.compile(r"-?\d+,\d+")
_THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3})+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{3,}|[A-Z]{3}|[A-Z][a-z]{2,} [A-Za-z0-9' -]+")


def parse_gold(answer: str) -> Parsed:
    """`answer` (without a box, or a text whose last box holds it) as math-verify parses it.

    Returns:
        [] if there is nothing in it; a lone string if it is no mathematics (compared as text).
    """
    return list(_parse_gold(answer))


@lru_cache(maxsize=4096)  # groups share their gold answer
def _parse_gold(answer: str) -> tuple[Basic | MatrixBase | str, ...]:
    parsed = _parse_answer(_gold_text(answer))
    if "$" in answer and not _is_parsed(parsed):  # a sentence that ends in the answer
        parsed = [*parse_response(answer), *parsed]
    return tuple(parsed)


def parse_response(text: str) -> Parsed:
    """The final answer of `text`: its last box, or without one what math-verify takes for it.

    Returns:
        [] if there is no answer; a lone string if the answer is no mathematics.
    """
    content = boxed_answer(text)
    if content is not None:
        return _parse_answer(normalise(content))
    # Under antlr 4.9.3 \% is lost; outside the dollars math-verify reads the sign itself.
    text = re.sub(r"\\?%\s{0,9}\$", "$%", text).replace("\\%", "%")
    text = re.sub(r"\\mathrm\{([eid])\}", r"\1", text)
    text = re.sub(r"(?<=[0-9$])(\s{0,9})per cent\b", r"\1percent", text)
    return parse(text, _TARGETS, parsing_timeout=None)


def verdict(gold: str, text: str) -> Verdict:
    """Whether the final answer of `text` equals the gold answer `gold`.

    May run for ever or take all memory: call it where it can be killed.

    Returns:
        UNVERIFIABLE only if the gold answer cannot be parsed and is not said word for word.
    """
    answers = final_answers(text)
    if not answers and re.fullmatch(_LETTER, _gold_text(gold)):
        if said := _SAID_CHOICE.findall(text):
            return Verdict(said[-1] == _gold_text(gold).strip("()"))
    if not answers:
        found = symbolic_verdict(gold, text)
        if found is not Verdict.RIGHT and _is_decimal(comma := _gold_text(gold)):
            found = symbolic_verdict(comma.replace(",", "."), text)
        return found
    found = Verdict.WRONG
    for answer in answers:
        found = _answer_verdict(gold, normalise(answer))
        if found is Verdict.RIGHT:
            break
    return found


def symbolic_verdict(gold: str, text: str) -> Verdict:
    """`verdict` by math-verify alone, without the short cuts for equal texts and numbers."""
    return _compare(parse_gold(gold), parse_response(text))


def _answer_verdict(raw_gold: str, answer: str) -> Verdict:
    """The verdict on an answer as `normalise` spells it."""
    gold = _gold_text(raw_gold)
    if not gold:
        return Verdict.UNVERIFIABLE
    if gold == answer:
        return Verdict.RIGHT
    gold, answer = _decimal_commas(gold, answer)
    numbers = number(gold.rstrip("\\%")), number(answer.rstrip("\\%"))
    if None not in numbers:
        if gold.endswith("%") != answer.endswith("%"):  # 28% is 28, and is 0.28
            percent, plain = numbers if gold.endswith("%") else numbers[::-1]
            return Verdict(plain in (percent, percent / 100))
        if numbers[0] == numbers[1]:
            return Verdict.RIGHT
        difference, size = abs(numbers[0] - numbers[1]), max(map(abs, numbers))
        are_whole = numbers[0].denominator == numbers[1].denominator == 1
        if are_whole or difference > _CLOSE * size:
            return Verdict.WRONG
    if re.fullmatch(_LETTER, gold) and (choice := _CHOICE.fullmatch(answer)):
        return Verdict(choice[1] == gold.strip("()"))
    if _NOON.search(gold) and _clock(gold) == _clock(answer):
        return Verdict.RIGHT
    if _are_apart(gold, answer):
        return Verdict.WRONG
    return _compare(parse_gold(raw_gold), _parse_answer(answer))


def _compare(gold: Parsed, answer: Parsed) -> Verdict:
    if verify(gold, answer, timeout_seconds=None):
        return Verdict.RIGHT
    return Verdict.WRONG if _is_parsed(gold) else Verdict.UNVERIFIABLE


def _is_parsed(parsed: Parsed) -> bool:
    return any(not isinstance(part, str) for part in parsed)


def _decimal_commas(gold: str, answer: str) -> tuple[str, str]:
    """Both with a decimal point, if one has a decimal comma (1,22) and the other a point."""
    for text, other in ((gold, answer), (answer, gold)):
        if _is_decimal(text) and re.fullmatch(r"-?\d*\.\d+", other):
            return gold.replace(",", "."), answer.replace(",", ".")
    return gold, answer


def _is_decimal(text: str) -> bool:
    return bool(_COMMA.fullmatch(text)) and not _THOUSANDS.fullmatch(text)


def _are_apart(gold: str, answer: str) -> bool:
    """Whether the answers surely differ where math-verify alone would call them equal."""
    pair = gold, answer
    bases = [_BASE.fullmatch(text) for text in pair]
    if all(bases):
        digits = [(base[1].lstrip("0"), base[2]) for base in bases if base]
        return digits[0] != digits[1]
    if (_RELATION.match(gold) is None) != (_RELATION.match(answer) is None):
        return True  # 5 and "> 5"
    halves = [_NOON.search(text) for text in pair]
    if all(halves) and len({half[1].lower() for half in halves if half}) == 2:
        return True  # 3:30 a.m. and 3:30 p.m.
    letters = [found[1] for text in pair if (found := _TERM.fullmatch(text))]
    if len(letters) == 2:
        return sorted(letters[0]) != sorted(letters[1]) and not set(letters) <= _UNITS
    # 2t is no 2, although a t may be a unit
    return len(letters) == 1 and letters[0] not in _UNITS and None not in map(_lone, pair)


def _clock(text: str) -> str:
    return re.sub(r"\\text\{|[}. ]", "", _NOON.sub(r"\1m", text)).lower()


def _lone(text: str) -> str | None:
    return text if _TERM.fullmatch(text) or number(text) is not None else None


@lru_cache(maxsize=4096)
def _gold_text(gold: str) -> str:
    readings = final_answers(gold)
    return normalise(readings[-1] if readings else gold)


def _parse_answer(answer: str) -> Parsed:
    """`answer`, as `normalise` spells it, parsed."""
    if not answer:
        return []
    if re.fullmatch(r"[0-9.]+(?: [0-9.]+)+", answer):
        return [answer]  # math-verify adds the numbers up: "12 34" would be 46
    if _WORDS.fullmatch(answer):
        answer = rf"\text{{{answer}}}"  # a word; as a product its letters could change places
    if (term := _TERM.fullmatch(answer)) and term[1] not in _UNITS:
        factors = "".join(rf"\cdot {{{letter}}}" for letter in term[1])
        answer = answer[: term.start(1)] + factors  # or math-verify takes the t of 2t for a unit
    parts = answer.split(",")
    are_percentages = all(part.rstrip().endswith("%") and part.count("%") == 1 for part in parts)
    if are_percentages:
        answer = re.sub(r"\\?%", "", answer)
    answer = re.sub(r"\\?%", r"\\cdot\\frac{1}{100}", answer)  # antlr 4.9.3 cannot read the sign
    # The whole box or nothing: a number that stands somewhere in it is no answer.
    parsed = parse(
        rf"\boxed{{{answer}}}", (_LATEX,), extraction_mode="first_match", parsing_timeout=None
    )
    if not are_percentages:
        return parsed
    try:
        return [_percentage(part) for part in parsed]
    except Exception:  # sympy's, of any type
        return [part for part in parsed if isinstance(part, str)]


def _percentage(part: Basic | MatrixBase | str) -> Basic | MatrixBase | str:
    if isinstance(part, str):
        return f"{part}%"
    if isinstance(part, Eq):
        return Eq(part.lhs, _percentage(part.rhs), evaluate=False)
    if isinstance(part, (FiniteSet, Tuple)):
        return type(part)(*map(_percentage, part.args))
    return convert_to_pct(part.doit() if part.is_number else part)
