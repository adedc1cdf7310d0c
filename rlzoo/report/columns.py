"""Names of the columns of validation; the k of avg@k is the run's own, a resume may change it."""

from __future__ import annotations

from collections.abc import Iterable

AVG, PASS = "val/avg_at_", "val/pass_at_"


def validated_ks(names: Iterable[str]) -> list[int]:
    """The k of each avg@k among these names of columns, in their order."""
    ends = (name.removeprefix(AVG) for name in names if name.startswith(AVG))
    return [int(end) for end in ends if end.isdecimal()]
