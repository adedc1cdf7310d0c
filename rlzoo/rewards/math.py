"""What a response's final answer is worth against a gold answer, by math-verify.

Pure functions without any limit of time or memory: math-verify's own time-outs are off, since they
need the main thread and whole seconds. Text from a model goes through
`rlzoo.rewards.verifier.VerifierPool`, which runs `verdict` in workers that it can kill.
"""

from __future__ import annotations

import re
from functools import lru_cache

from latex2sympy2_extended.latex2sympy2 import convert_to_pct
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

from rlzoo.rewards.base import Verdict

Parsed = list[Basic | MatrixBase | str]  # math-verify's: the expression, then its text

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
_GOLD_TARGETS = (_LATEX,)
_RESPONSE_TARGETS = (_LATEX, ExprExtractionConfig())

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(
    r"(?:\s|\$|\\[()\[\]])*(?:,|;|,?\s*and|,?\s*or)(?:\s|\$|\\[()\[\]])*", re.DOTALL
)
_INTEGER = re.compile(r"-?[0-9]{1,100}")


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{...}` of `text`, or None without one.

    Boxes joined by nothing but a comma, "and" or "or" are one answer of several parts, as in
    math-verify. One pass over the text, whatever it holds.
    """
    opened: list[re.Match[str]] = []
    boxes: list[tuple[int, int, int]] = []  # command start, content start, content end
    for token in _BRACES.finditer(text):
        if token["box"] or token[0] == "{":
            opened.append(token)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start["box"]:
                boxes.append((start.start(), start.end(), token.start()))
    if not boxes:
        return None
    begin, *content = boxes.pop()
    parts = [text[slice(*content)]]
    for start, *content in reversed(boxes):
        gap = text[content[1] + 1 : min(begin, content[1] + 41)]
        if content[1] > begin or not _BETWEEN_BOXES.fullmatch(gap):
            break
        parts.append(text[slice(*content)])
        begin = start
    return ", ".join(reversed(parts))


def normalise(answer: str) -> str:
    """`answer` in the spelling compared as text and parsed; it means the same."""
    answer = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\?\$", "", answer)
    answer = re.sub(r"(?<=[0-9])\.(?![0-9.])", "", answer)  # "7." and "1./3" do not parse
    answer = re.sub(r"\s+", " ", answer.strip().rstrip(".").rstrip())
    # math-verify adds what a space separates: 1\,234 would be 235.
    return re.sub(r"(?<=[0-9])(?:\\[,;:! ]|\{,\})(?=[0-9]{3}(?![0-9]))", "", answer)


def parse_gold(answer: str) -> Parsed:
    """`answer` (without a box, or a text whose last box holds it) as math-verify parses it.

    Returns:
        [] if there is nothing in it; a lone string if it is no mathematics (compared as text).
    """
    return list(_parse_gold(answer))


@lru_cache(maxsize=4096)  # groups share their gold answer
def _parse_gold(answer: str) -> tuple[Basic | MatrixBase | str, ...]:
    return tuple(_parse_answer(_content(answer), _GOLD_TARGETS))


def parse_response(text: str) -> Parsed:
    """The final answer of `text`: its last box, or without one what math-verify takes for it.

    Returns:
        [] if there is no answer; a lone string if the answer is no mathematics.
    """
    content = boxed_answer(text)
    if content is not None:
        return _parse_answer(content, _RESPONSE_TARGETS)
    # Under antlr 4.9.3 \% is lost; outside the dollars math-verify reads the sign itself.
    text = re.sub(r"\\?%\s{0,9}\$", "$%", text).replace("\\%", "%")
    return parse(text, _RESPONSE_TARGETS, parsing_timeout=None)


def verdict(gold: str, text: str) -> Verdict:
    """Whether the final answer of `text` equals the gold answer `gold`.

    May run for ever or take all memory: call it where it can be killed.
    """
    answer = boxed_answer(text)
    if answer is None:
        return symbolic_verdict(gold, text)
    gold_text, answer_text = normalise(_content(gold)), normalise(answer)
    if not gold_text:
        return Verdict.UNVERIFIABLE
    if gold_text == answer_text:
        return Verdict.RIGHT
    if _INTEGER.fullmatch(gold_text) and _INTEGER.fullmatch(answer_text):
        return Verdict(int(gold_text) == int(answer_text))
    return symbolic_verdict(gold, text)


def symbolic_verdict(gold: str, text: str) -> Verdict:
    """`verdict` by math-verify alone, without its short cuts for equal texts and integers."""
    parsed_gold = parse_gold(gold)
    if verify(parsed_gold, parse_response(text), timeout_seconds=None):
        return Verdict.RIGHT
    is_parsed = any(not isinstance(part, str) for part in parsed_gold)
    return Verdict.WRONG if is_parsed else Verdict.UNVERIFIABLE


def _content(answer: str) -> str:
    boxed = boxed_answer(answer)
    return answer if boxed is None else boxed


def _parse_answer(
    answer: str, targets: tuple[LatexExtractionConfig | ExprExtractionConfig, ...]
) -> Parsed:
    answer = normalise(answer)
    if not answer:
        return []
    if re.fullmatch(r"[0-9.]+(?: [0-9.]+)+", answer):
        return [answer]  # math-verify adds the numbers up: "12 34" would be 46
    if re.fullmatch(r"[A-Za-z][A-Za-z' -]{3,}", answer):
        answer = rf"\text{{{answer}}}"  # a word; as a product its letters could change places
    is_percentage = re.fullmatch(r"[^%,;]+?\\?%", answer) is not None
    if is_percentage:
        answer = answer.rstrip("%").rstrip("\\")
    answer = re.sub(r"\\?%", r"\\cdot\\frac{1}{100}", answer)  # antlr 4.9.3 cannot read the sign
    parsed = parse(rf"\boxed{{{answer}}}", targets, parsing_timeout=None)
    if not is_percentage:
        return parsed
    return [f"{part}%" if isinstance(part, str) else convert_to_pct(part) for part in parsed]
