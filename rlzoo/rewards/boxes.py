r"""Where a response says its final answer: the last `\boxed{...}`, or several that belong together.

One pass over the text, whatever it holds: responses come from models and may be hostile.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TOKENS = re.compile(
    r"\\(?:boxed|fbox|framebox)(?:\s*(?P<brace>\{)|\s*(?P<bare>-?\d+(?:[.,/]\d+)*)"
    r"|\s+(?P<letter>[A-Za-z])(?![A-Za-z]))|\\.|[{}]",
    re.DOTALL,
)
_SPACE = r"(?:\s|~|\$|&(?=\s*\\)|\\[()\[\],;:! \\]|\\q?quad(?![a-z])|\\[hv]space\{[^{}]*\}|\*\*)"
_AND = (
    r"(?:[,;]|,?\s*(?:and|or)(?![a-z])|\\&|&|\\(?:land|lor|wedge|vee)(?![a-z])"
    r"|\\(?:text(?:rm|bf|it|normal)?|mbox|mathrm)\s*\{\s*(?:[,;]|,?\s*(?:and|or))\s*\})"
)
_NAME = r"(?:[A-Za-z][A-Za-z0-9_{}()]{0,8}\s*=)"
# "3 and 7" is one answer of two parts, whatever spacing and dollar signs stand between.
_JOINED = re.compile(rf"{_SPACE}*{_AND}(?:{_SPACE}|{_AND})*{_NAME}?{_SPACE}*")
_MAYBE_JOINED = re.compile(rf"\b(?:and|or|as well as)\b|[,;]|^{_SPACE}*$")
_SENTENCE_ENDS = re.compile(r"[A-Za-z]{2}[.!?]\s")
_FAR, _NEAR = 70, 10  # characters between boxes that may belong together; as in math-verify
_PERCENT_AFTER = re.compile(  # spaces are bounded: two runs of them would take quadratic time
    r"\s{0,9}(?:\$|\\[)\]])?\s{0,9}(?:\\text\{\s{0,9})?"
    r"(?:\\?%|per\s?cent\b|pct\b|percentage\b)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+\d.,/ ]+|-?\\[dt]?frac[\d{} ]+")
# How Minerva's prompt has a response end (arXiv:2206.14858, appendix D.2).
_CLOSING = re.compile(r"final answer is:?\s*(\S.{0,200}?)\.?\s*I hope it is correct", re.IGNORECASE)


class Box(NamedTuple):
    start: int
    end: int
    content: str


def final_answers(text: str) -> tuple[str, ...]:
    r"""The readings of what `text` says is its answer; () if there is no closed box.

    Boxes joined by nothing but a comma, "and" or "or" are one answer of several parts. With other
    words between two near boxes it is open whether the second belongs to the first or replaces it:
    the last alone is one reading, all of them together the other. Empty boxes count for nothing,
    and nor does one that a truncated response never closed.
    """
    boxes = closed_boxes(text)
    if not boxes:
        return ()
    if closing := list(_CLOSING.finditer(text, boxes[-1].end)):
        return (closing[-1][1],)
    joined, nearby, _ = _chain(text, boxes)
    return tuple(dict.fromkeys((", ".join(joined), ", ".join(nearby))))


def boxed_answer(text: str) -> str | None:
    r"""The first of `final_answers`, or None: what stands in the last closed `\boxed{...}`."""
    readings = final_answers(text)
    return readings[0] if readings else None


def shorten(response: str) -> str:
    """The part of a response that decides its verdict: its last boxes, or all of it without one."""
    readings = final_answers(response)
    if not readings:
        return response
    alone = rf"\boxed{{{readings[0]}}}"
    if final_answers(alone) == readings:
        return alone
    boxes = closed_boxes(response)
    start = _chain(response, boxes)[-1]
    return response[start : boxes[-1].end + _FAR] if len(readings) > 1 else response[start:]


def closed_boxes(text: str) -> list[Box]:
    """Boxes that are closed, hold something, and stand in no other; a nested one speaks for all."""
    opened: list[tuple[re.Match[str], int]] = []  # token, boxes known when it opened
    boxes: list[Box] = []
    for token in _TOKENS.finditer(text):
        bare = token["bare"] or token["letter"]
        if bare:
            boxes.append(Box(token.start(), token.end(), bare))
        elif token["brace"] or token[0] == "{":
            opened.append((token, len(boxes)))
        elif token[0] == "}" and opened:
            start, known = opened.pop()
            if start["brace"]:
                inner = boxes[known:]
                content = inner[-1].content if inner else text[start.end() : token.start()].strip()
                del boxes[known:]
                if content:
                    boxes.append(Box(start.start(), token.end(), content))
    return boxes


def _chain(text: str, boxes: list[Box]) -> tuple[list[str], list[str], int]:
    """The parts of the answer that ends in the last box: surely joined, perhaps joined, and where
    the first of these begins."""
    last = boxes[-1]
    is_percentage = _NUMBER.fullmatch(last.content) and _PERCENT_AFTER.match(text, last.end)
    joined = [last.content + r"\%" * bool(is_percentage)]
    nearby, sure, begin, after = list(joined), True, last.start, last.content
    for box in reversed(boxes[:-1]):
        gap = text[box.end : begin]
        if len(gap) > _FAR:
            break
        sure = sure and _JOINED.fullmatch(gap) is not None
        repeated = box.content == after
        may_join = _MAYBE_JOINED.search(gap) and not _SENTENCE_ENDS.search(gap)
        if not sure and len(gap) >= _NEAR and (repeated or not may_join):
            break
        begin, after = box.start, box.content
        if not repeated:
            nearby.insert(0, box.content)
            if sure:
                joined.insert(0, box.content)
    return joined, nearby, begin
