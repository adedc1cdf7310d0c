"""What a trainer waits at before each rollout step, so that two trainers can be timed in turn.

Both workers of `rlzoo.bench.loop` import it, TRL's from an environment that has torch and no more
of rlzoo than this folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any


class Gate:
    """Between two rollout steps: says what the last one took, and waits to be told to go on.

    What libraries print goes to stderr; the bench reads JSON lines from stdout.
    """

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.began: float | None = None
        self.before: Counter[str] = Counter()

    def wait(self, totals: Mapping[str, float], facts: Mapping[str, Any] | None = None) -> None:
        """The end of a step and the start of the next.

        Args:
            totals: counts and seconds since the start; their differences are sent.
            facts: sent as they are, with the first.
        """
        now = time.perf_counter()
        if self.began is None:
            said: dict[str, Any] = {"ready": dict(facts or {})}
        else:
            took = {name: value - self.before[name] for name, value in totals.items()}
            said = {"seconds": now - self.began, **took}
        self.out.write(json.dumps(said) + "\n")
        if not sys.stdin.readline():
            os._exit(0)  # the bench has what it wants
        self.before = Counter(totals)
        self.began = time.perf_counter()


def parity(texts: list[str]) -> list[float]:
    """The reward of both: 1 for half of all texts, by their bytes. It costs nothing, so that what
    is compared is the loop and not a verifier."""
    return [float(zlib.crc32(text.encode()) & 1) for text in texts]
