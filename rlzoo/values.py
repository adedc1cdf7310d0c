"""What a setting may hold: types with bounds for signatures, and what to say of another value.

A class of rlzoo's that takes settings says in its `__init__` what each may be, with the names
below; `rlzoo.launch.schema` compares a configuration with that before anything is built.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError


class Says(NamedTuple):
    """A mark with a sentence that the message of a misfit ends with."""

    text: str


class Refused:
    """Annotation of an argument that is not the user's to set, whatever the value."""


IS_PATH = "path"  # mark of a text that names a file or folder: a leading ~ is the home folder

AtLeast0 = Annotated[int, Ge(0)]
AtLeast1 = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]  # numpy's range, which Lightning seeds too
Threads = Annotated[int, Ge(1), Le(4096)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
ShareAbove0 = Annotated[float, Gt(0), Le(1)]
ShareBelow1 = Annotated[float, Ge(0), Lt(1)]
Text = Annotated[str, MinLen(1)]
Device = Annotated[
    str,
    StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$"),
    Says("It is auto, cpu, cuda or cuda:NUMBER"),
]
Precision = Literal[  # Lightning's names
    "32-true", "bf16-mixed", "bf16-true", "64-true", 32, "32", 64, "64", "bf16", None
]
PathText = Annotated[str, MinLen(1), IS_PATH]

# JSON is how pydantic is given a list where a tuple is wanted, and nothing else than what is
# written: no number for a text, no text for a number, no 1 for true.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def misfit(annotation: Any, value: object) -> str | None:
    """What is wrong with a value, such as "must be a number, above 0, got nan"; None if nothing is.

    Args:
        annotation: of the argument that takes it. One that pydantic cannot read fits anything.
        value: plain: numbers, texts, lists, mappings, null.
    """
    if fits(annotation, value):
        return None
    said = [f" {mark.text}." for mark in marks(annotation) if isinstance(mark, Says)]
    hint = "".join(said) or mend(annotation, value)
    return f"must be {words(annotation)}, got {shown(value)}.{hint}"


def fits(annotation: Any, value: object) -> bool:
    if refuses(annotation):
        return False
    plain, parts = without_says(annotation), typing.get_args(without_says(annotation))
    if typing.get_origin(plain) is Literal:  # to Python 1, 1.0 and true are one, to Lightning not
        return any(type(part) is type(value) and part == value for part in parts)
    if typing.get_origin(plain) in (Union, types.UnionType):
        return any(fits(part, value) for part in parts)
    try:
        if (adapter := adapter_of(annotation)) is not None:
            adapter.validate_json(json.dumps(value, default=str))
    except ValidationError:
        return False
    except TypeError:  # not hashable, so not one of ours
        return True
    return True


def marks(annotation: Any) -> tuple[Any, ...]:
    """What stands beside the type in an `Annotated`."""
    return typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()


def without_says(annotation: Any) -> Any:
    """An annotation less the sentences beside it; one with bounds stays as it is."""
    alone = marks(annotation) and all(isinstance(mark, Says) for mark in marks(annotation))
    return typing.get_args(annotation)[0] if alone else annotation


@cache
def adapter_of(annotation: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(annotation, config=STRICT)
    except (PydanticUserError, SchemaError):
        return None


def words(annotation: Any) -> str:
    """An annotation in the words of a configuration: "a whole number, at least 1, or null"."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limits = [text for mark in inner[1:] if (text := bound(mark))]
        return ", ".join([words(inner[0]), *limits])
    if origin in (Union, types.UnionType):
        if float in inner:  # torch's optimizers take a tensor for a number too
            inner = tuple(part for part in inner if part in NAMES)
        known = list(dict.fromkeys(map(words, inner)))
        if "null" in known:  # last
            known.remove("null")
            known.append("null")
        return " or ".join(known) if "," not in "".join(known) else ", or ".join(known)
    if origin is Literal:
        return "one of " + ", ".join(map(shown, inner)) if len(inner) > 1 else shown(inner[0])
    if origin is tuple and Ellipsis not in inner:
        return f"a list of {len(inner)}: {', '.join(map(words, inner))}"
    kind = origin or annotation
    if kind in NAMES:
        return NAMES[kind]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping of names to values"
    if isinstance(kind, type) and issubclass(kind, typing.Sequence | tuple | set | frozenset):
        of = [words(part) for part in inner if part is not Ellipsis]
        return f"a list, each {of[0]}" if of else "a list"
    if kind is Callable or isinstance(kind, type):
        return "a mapping with a _target_ that makes it"
    return str(annotation)


NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    None: "null",
    Refused: "left out",
    Any: "anything",
}


def bound(mark: object) -> str | None:
    """A bound in words; None for a mark that is none."""
    match mark:
        case Ge(ge=low):
            return f"at least {low:,}"
        case Gt(gt=low):
            return f"above {low:,}"
        case Le(le=high):
            return f"at most {high:,}"
        case Lt(lt=high):
            return f"below {high:,}"
        case MinLen(min_length=1):
            return "not empty"
    return None


def shown(value: object) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def mend(annotation: Any, value: object) -> str:
    """What to write instead, where that can be told."""
    if isinstance(value, float) and value.is_integer() and fits(annotation, int(value)):
        return f" Write {int(value)}."
    if isinstance(value, str):
        for wanted in (value.strip().lower(), value.strip()):
            for meant in plain_meanings(wanted):
                if fits(annotation, meant):
                    return f" Write {json.dumps(meant)}, without quotes."
    if not isinstance(value, (list, Mapping)) and fits(annotation, [value]):
        return f" Write [{value if isinstance(value, str) else json.dumps(value)}]."
    return ""


def plain_meanings(text: str) -> list[object]:
    """What a text may have been meant for: a number, or true and false in other words."""
    found: list[object] = [{"yes": True, "on": True, "no": False, "off": False}.get(text)]
    for kind in (int, float):
        try:
            found.append(kind(text))
        except ValueError:
            continue
    try:
        found.append(json.loads(text))
    except ValueError:
        pass
    return [meaning for meaning in found if meaning is not None]


def is_path(annotation: Any) -> bool:
    """Whether an argument takes the name of a file or folder."""
    if IS_PATH in marks(annotation):
        return True
    return any(is_path(part) for part in typing.get_args(annotation))


def refuses(annotation: Any) -> bool:
    """Whether an argument is not the user's to set."""
    return Refused in (annotation, *typing.get_args(annotation))
