"""Gold answers: what a cell of a data file says, as the text that responses are compared with."""

from __future__ import annotations

import json
import numbers
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rlzoo.rewards.boxes import closed_boxes

MOST_PLACES = 4000  # a number is written out with so many digits, at most

_SCIENTIFIC = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?[0-9][0-9.,]*([eE][+-]?[0-9]+)?")
_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")  # a chat as text
_SPACED = re.compile("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")  # unbroken spaces


class BadRow(ValueError):
    """What is wrong with one row; the reader adds the file and the line."""


# --- text and numbers ---------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """The value as text; numbers in ordinary notation, with the digits that they have.

    Raises:
        BadRow: neither text nor a finite number, or nothing but spaces.
    """
    if isinstance(value, bytes):  # what some writers of parquet store text as
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadRow(f"holds bytes that are not UTF-8 text ({error})") from None
    text = value.strip() if isinstance(value, str) else number_text(value)
    if not text:
        raise BadRow("is empty")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow("holds half a surrogate pair, which no tokenizer can read")
    return text


def number_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as in JSON
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Decimal | numbers.Real):
        # float32 in its own few digits: 0.1, where float64 would give 0.10000000149
        return ordinary(value if isinstance(value, Decimal) else Decimal(str(value)))
    problem = f"is a {type(value).__name__}, not text or a number"
    if isinstance(value, dict):
        problem += f"; name one of its fields behind a dot, of {sorted(map(str, value))}"
    elif hasattr(value, "year") or hasattr(value, "hour"):
        problem += "; write it as text, as a response should give it"
    raise BadRow(problem)


def ordinary(number: Decimal) -> str:
    """0.000015 for 1.5e-05, 27 for 27.0, 0 for -0.0; 1.50 stays as it is."""
    if not number.is_finite():
        raise BadRow(f"is {str(number).lower()}")
    if abs(number.adjusted()) > MOST_PLACES:
        raise BadRow(f"is {number:.3E}, a number of more than {MOST_PLACES} places")
    if number == 0:
        return "0"
    text = f"{number:f}"
    whole, _, places = text.partition(".")
    return text if places.strip("0") else whole


def written_out(text: str) -> str:
    """A text that is one number and nothing else, as `ordinary` has it; any other as it is.

    Scientific notation would be read as a product with e; full-width digits, a minus sign that is
    no hyphen and unbroken spaces between thousands would not be read at all.
    """
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", _SPACED.sub("", text)).replace("\u2212", "-")
        text = folded if _NUMBER.fullmatch(folded) else text
    return ordinary(Decimal(text)) if _SCIENTIFIC.fullmatch(text) else text


# --- formats ------------------------------------------------------------------------------------


def plain(value: Any) -> str:
    """The answer itself, as text or as a number.

    Raises:
        BadRow: see `text_of`; or a whole solution.
    """
    if isinstance(value, list):
        raise BadRow("is a list, not text or a number; data.answer_format=first takes its first")
    text = text_of(value)
    if text.startswith('["') and text.endswith('"]'):
        raise BadRow("is a list written as text; data.answer_format=first takes its first")
    if "####" in text:
        raise BadRow("holds ####, so a solution; data.answer_format=hashes takes what stands after")
    if text.lower() == "nan":  # a missing value that was made text on the way
        raise BadRow("is nan")
    return written_out(text)


def boxed(value: Any) -> str:
    r"""What the last box of a text holds (`\boxed{...}`, `\boxed 5`, `\fbox{...}`), as the
    verifier finds it in a response."""
    text = text_of(value)
    boxes = closed_boxes(text)
    if text.rfind(r"\boxed") >= (boxes[-1].end if boxes else 0):
        raise BadRow(r"ends in a \boxed{ that is never closed, or holds nothing")
    if not boxes:
        raise BadRow(r"holds no \boxed{...}")
    return plain(boxes[-1].content)


def hashes(value: Any) -> str:
    """What stands after the last `####`, without thousands separators: GSM8K's format."""
    before, mark, after = text_of(value).rpartition("####")
    if not mark:
        raise BadRow("holds no ####")
    return plain(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", after))


def first(value: Any) -> str:
    """The first element of a list, which may be written as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_text(value, "list")
    if not isinstance(value, list):
        raise BadRow(f"is a {type(value).__name__}, not a list")
    if not value:
        raise BadRow("is an empty list")
    if value[0] is None:
        raise BadRow("is a list that begins with null")
    return plain(value[0])


ANSWER_FORMATS: dict[str, Callable[[Any], str]] = {
    "plain": plain,
    "boxed": boxed,
    "hashes": hashes,
    "first": first,
}


def from_text(text: str, what: str) -> Any:
    """What JSON text stands for, numbers with the digits that they have."""
    try:
        return json.loads(text, parse_float=Decimal, parse_int=Decimal)
    except ValueError as error:
        raise BadRow(f"is a {what} written as text that is not JSON ({error})") from None


# --- chats --------------------------------------------------------------------------------------


def chat_turns(value: list[Any]) -> tuple[dict[str, Any], ...]:
    """The turns of a prompt that the data has as a chat: a list of {role, content}, user last.

    What a turn has beside the two, and is not null, goes to the chat template as well.

    Raises:
        BadRow: no such list, or one that ends with an assistant's turn.
    """
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            keys = f" but of {sorted(turn)}" if isinstance(turn, dict) else ""
            raise BadRow(f"is a list whose turns are not of 'role' and 'content'{keys}")
        if not isinstance(turn["role"], str) or not isinstance(turn["content"], str):
            kind = type(turn["content"]).__name__
            raise BadRow(f"has a turn of {turn['role']} whose content is a {kind}, not text")
        if not turn["content"].strip():
            raise BadRow(f"has an empty turn of {turn['role']}")
        turns.append({key: entry for key, entry in turn.items() if entry is not None})
    if not turns:
        raise BadRow("is an empty list of turns")
    if turns[-1]["role"] == "assistant":
        raise BadRow(
            "ends with an assistant's turn, so the prompt would give the answer away; name the turn"
            " that asks, such as messages.0.content"
        )
    return tuple(turns)


def chat_text(turns: tuple[dict[str, Any], ...]) -> str:
    """The chat as one text, to be read and told apart by."""
    said = [(str(turn["role"]), str(turn["content"]).strip()) for turn in turns]
    return said[0][1] if len(said) == 1 else "\n\n".join(f"{who}: {what}" for who, what in said)


def turns_and_text(value: Any) -> tuple[tuple[dict[str, Any], ...] | None, str]:
    """(turns, text) of a question that may be a chat; turns are None where it is text."""
    if isinstance(value, str) and _CHAT.match(value):
        value = from_text(value, "chat")
    if not isinstance(value, list):
        return None, text_of(value)
    turns = chat_turns(value)
    return turns, chat_text(turns)
