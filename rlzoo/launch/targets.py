"""What the `_target_` of a node names. It is asked what it is, by its class and never by its name,
so that a class of one's own is read as what it is made from.
"""

from __future__ import annotations

import pydoc
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlzoo.errors import UserError, first_line

# Modules and classes that had another name: for configurations and classes from then.
MOVED = {
    f"rlzoo.{name}": f"rlzoo.{room}.{name}"
    for room, names in {
        "learning": ("advantages", "losses", "metrics", "microbatching", "selection"),
        "models": ("checkpoints", "gradnorms", "logprobs"),
        "report": ("columns", "ledger", "loggers", "plots", "progress", "trackers"),
    }.items()
    for name in names
} | {
    "rlzoo.distributed": "rlzoo.ranks.exchange",
    "rlzoo.rewards.length": "rlzoo.learning.shaping",
    "rlzoo.allocators.GVM": "rlzoo.allocators.GVMBudgets",
    "rlzoo.algos.clipped": "rlzoo.algos.base",
}


def target_of(node: Mapping[str, Any]) -> Callable[..., Any]:
    """The class or function that a node names.

    Raises:
        UserError: there is none of that name.
    """
    path, reason = node["_target_"], "there is no such class or function."
    try:
        target = pydoc.locate(path) if isinstance(path, str) else None
    except pydoc.ErrorDuringImport as error:
        target, reason = None, first_line(error)
    if not callable(target):
        raise UserError(f"{path} cannot be imported: {reason}{now_called(f'{path}: {reason}')}")
    return target


def is_kind(target: object, kind: type) -> bool:
    return isinstance(target, type) and issubclass(target, kind)


def present_name(value: object) -> object:
    """The name that a `_target_` from then has now; anything else as it is."""
    for old, new in MOVED.items():
        if isinstance(value, str) and (value == old or value.startswith(f"{old}.")):
            return new + value.removeprefix(old)
    return value


def now_called(text: str) -> str:
    """A sentence on the first thing that a text has under an older name; empty if it has none."""
    for old, new in MOVED.items():
        if re.search(rf"\b{re.escape(old)}\b", text):
            return f" {old} is now {new}."
    return ""
