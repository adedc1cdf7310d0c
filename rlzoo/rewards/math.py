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
from sympy import Basic, Eq, I, MatrixBase, Symbol, Tuple, nan, zoo
from sympy.concrete.expr_with_limits import ExprWithLimits

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
_MODULUS = re.compile(
    r"\s*\(?(?:\\[pb]?mod|\bmod|\\(?:text|mathrm)\s*\{\s*mod\s*\})\s*\{?(\w+)\}?\s*\)?$"
)
_OPEN_ENDED = re.compile(r"\bor (?:more|less|fewer|greater|higher|lower|above|below|over|under)\b")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(
    rf"(?<=\d)[\s~\\,]*(?:\\(?:text\w*|mbox)\s*\{{\s*)?({'|'.join(_SCALES)})\b[^{{}}\d]*\}}?[\s.]*$"
)
# Spaces that say nothing: not those between words, nor those between numbers.
_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])|(?<=[0-9]) (?=[A-Za-z])")
_LETTER = r"\(?[A-J]\)?"
_LABEL = re.compile(r"(?:\\(?:text\w*|mbox|mathrm)\s*\{\s*)?\(?([A-J])[).]\.?\s*\}?\s*(?=\S)")
_CHOICE = re.compile(
    r"(?:\\text\w*\s*\{\s*)?(?i:option |choice )?\(?([A-J])(?:\)?\.?|[).:}]+ ?.+)", re.DOTALL
)
_SAID_CHOICE = re.compile(
    r"(?i:answer)(?i:\s+is)?[:\s*$]{1,5}(?:\\text\w*\{)?\(?([A-J])\)?(?![A-Za-z0-9'])"
)
_COMMA = re.compile(r"-?\d+,\d+")
_THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3})+")
_WORDS = re.compile(  # with letters that stand together: p - q is none
    r"(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z' -]{3,}|[A-Z]{3}|[A-Z][a-z]{2,} [A-Za-z0-9' -]+"
)


@lru_cache(maxsize=4096)  # groups share their gold answer
def parse_gold(answer: str) -> Parsed:
    """`answer` (without a box, or a text whose last box holds it) as math-verify parses it.

    Returns:
        [] if there is nothing in it; a lone string if it is no mathematics (compared as text).
    """
    parsed = _parse_answer(_gold_text(answer))
    if "$" in answer and not _is_parsed(parsed):  # a sentence that ends in the answer
        return [*parse_response(answer), *parsed]
    return parsed


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
    return _settled(parse(_with_gamma(text), _TARGETS, parsing_timeout=None))


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
        for pair in _scaled_alike(gold, answer):
            found = _answer_verdict(pair[0], normalise(pair[1]))
            if found is Verdict.RIGHT:
                return found
    return found


def symbolic_verdict(gold: str, text: str) -> Verdict:
    """`verdict` by math-verify alone, without the short cuts for equal texts and numbers."""
    return _compare(parse_gold(gold), parse_response(text))


def _answer_verdict(raw_gold: str, answer: str) -> Verdict:
    """The verdict on an answer as `normalise` spells it."""
    gold = _gold_text(raw_gold)
    if not gold:
        return Verdict.UNVERIFIABLE
    if gold == answer or _tight(gold) == _tight(answer):
        return Verdict.RIGHT
    gold, answer = _decimal_commas(*_without_label(*_without_modulus(gold, answer)))
    wanted, given = number(gold.rstrip("\\%")), number(answer.rstrip("\\%"))
    if wanted is not None and given is not None:
        if gold.endswith("%") != answer.endswith("%"):  # 28% is 28, and is 0.28
            percent, plain = (wanted, given) if gold.endswith("%") else (given, wanted)
            return Verdict(plain in (percent, percent / 100))
        if wanted == given:
            return Verdict.RIGHT
        are_whole = wanted.denominator == given.denominator == 1
        if are_whole or abs(wanted - given) > _CLOSE * max(abs(wanted), abs(given)):
            return Verdict.WRONG
    if re.fullmatch(_LETTER, gold) and (choice := _CHOICE.fullmatch(answer)):
        return Verdict(choice[1] == gold.strip("()"))
    if _NOON.search(gold) and _clock(gold) == _clock(answer):
        return Verdict.RIGHT
    if _are_apart(gold, answer):
        return Verdict.WRONG
    parsed = parse_gold(raw_gold) if gold == _gold_text(raw_gold) else _parse_answer(gold)
    return _compare(parsed, _parse_answer(answer))


def _compare(gold: Parsed, answer: Parsed) -> Verdict:
    if verify(gold, answer, timeout_seconds=None):
        return Verdict.RIGHT
    return Verdict.WRONG if _is_parsed(gold) else Verdict.UNVERIFIABLE


def _tight(text: str) -> str:
    """The text with one spelling of spaces, fractions and short indices."""
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", _SPACE.sub("", text))
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def _scaled_alike(gold: str, answer: str) -> list[tuple[str, str]]:
    """5 million as five times a million; against a 5 alone, the word is a unit as well."""
    scaled = _scaled(gold), _scaled(answer)
    if scaled[0] != gold and scaled[1] != answer:
        return [scaled]
    return [(gold, answer)] if scaled == (gold, answer) else [(gold, answer), scaled]


def _scaled(text: str) -> str:
    return _SCALED.sub(lambda word: rf" \cdot 10^{{{_SCALES[word[1]]}}}", text)


def _without_modulus(gold: str, answer: str) -> tuple[str, str]:
    """Both without a modulus, if it is the same or the answer's alone."""
    moduli = [_MODULUS.search(text) for text in (gold, answer)]
    if moduli[1] is None or (moduli[0] and moduli[0][1] != moduli[1][1]):
        return gold, answer
    return gold[: moduli[0].start()] if moduli[0] else gold, answer[: moduli[1].start()]


def _without_label(gold: str, answer: str) -> tuple[str, str]:
    """Both without the letter of a choice that stands before the value of one of them alone."""
    labels = [_LABEL.match(text) for text in (gold, answer)]
    if labels[0] and not labels[1]:
        return labels[0][1] if re.fullmatch(_LETTER, answer) else gold[labels[0].end() :], answer
    if labels[1] and not labels[0] and not re.fullmatch(_LETTER, gold):
        return gold, answer[labels[1].end() :]
    return gold, answer


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
    if (_OPEN_ENDED.search(gold) is None) != (_OPEN_ENDED.search(answer) is None):
        return True  # 5 and "5 or more"
    halves = [_NOON.search(text) for text in pair]
    if all(halves) and len({half[1].lower() for half in halves if half}) == 2:
        return True  # 3:30 a.m. and 3:30 p.m.
    letters = [found[1] for text in pair if (found := _TERM.fullmatch(text))]
    if len(letters) == 2:
        return sorted(letters[0]) != sorted(letters[1]) and not set(letters) <= _UNITS
    # 2t is no 2, although a t may be a unit
    alone = all(_TERM.fullmatch(text) or number(text) is not None for text in pair)
    return len(letters) == 1 and letters[0] not in _UNITS and alone


def _clock(text: str) -> str:
    return re.sub(r"\\text\{|[}. ]", "", _NOON.sub(r"\1m", text)).lower()


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
    boxed = rf"\boxed{{{_with_gamma(answer)}}}"
    parsed = _settled(parse(boxed, (_LATEX,), extraction_mode="first_match", parsing_timeout=None))
    if not _is_parsed(parsed) and (tight := _tight(answer)) != answer:
        return _parse_answer(tight)  # "a - b - c" is none to math-verify, a-b-c is
    if not are_percentages:
        return parsed
    try:
        return [_percentage(part) for part in parsed]
    except Exception:  # sympy's, of any type
        return [part for part in parsed if isinstance(part, str)]


def _with_gamma(text: str) -> str:
    """With a symbol for the letter, which the grammar takes for the gamma function or Euler's."""
    return re.sub(r"\\gamma(?![A-Za-z])", r"\\varsigma", text)


def _settled(parsed: Parsed) -> Parsed:
    """With one i, the imaginary unit, where math-verify has two symbols by the spaces around it;
    and with a name for 1/0 (such as 12:00), which in sympy equals 2/0."""
    return [
        part
        if isinstance(part, str)
        else Symbol(str(parsed[-1]))
        if part.has(zoo, nan)
        else _with_unit(part)
        for part in parsed
    ]


def _with_unit(part: Basic | MatrixBase) -> Basic | MatrixBase:
    symbols = part.free_symbols
    if all(s.is_real and s.name != "i" for s in symbols) or part.has(ExprWithLimits):
        return part  # in a sum, i is an index
    try:
        if isinstance(part, Eq):  # a real x = 1 + i would be false at once
            return Eq(*map(_with_unit, part.args), evaluate=False)
        if part.has(Eq):
            return part.func(*map(_with_unit, part.args))
        names = {s: I if s.name == "i" else Symbol(s.name, real=True) for s in symbols}
        return part.xreplace(names)
    except Exception:  # sympy's, of any type: x < i
        return part


def _percentage(part: Basic | MatrixBase | str) -> Basic | MatrixBase | str:
    if isinstance(part, str):
        return f"{part}%"
    if isinstance(part, Eq):
        return Eq(part.lhs, _percentage(part.rhs), evaluate=False)
    if isinstance(part, (FiniteSet, Tuple)):
        return type(part)(*map(_percentage, part.args))
    return convert_to_pct(part.doit() if part.is_number else part)
