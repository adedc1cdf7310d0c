"""The ledger: everything a run has spent, so that curves can be drawn against any cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlzoo.ranks.whereabouts import HERE
from rlzoo.report.peaks import Peaks
from rlzoo.values import AtLeast1, Positive

PAID = ("train", "pilot")  # streams whose responses the budget pays for


@dataclass(frozen=True)
class Limits:
    """Stop rules, each checked before a rollout step begins; None never stops."""

    max_responses: AtLeast1 | None = None  # paid ones: training, filtered ones and pilots included
    max_tokens: AtLeast1 | None = None  # generated tokens of paid responses
    max_seconds: Positive | None = None  # of wall time, resumed parts added up
    max_updates: AtLeast1 | None = None  # optimizer steps


class Ledger:
    """Counts responses and tokens by stream, updates, and seconds by phase.

    Phases may nest; a second is counted in the innermost phase alone, so that the phases and
    "other" add up to all the seconds. What drawing costs is booked by stream, since training,
    pilots and validation all draw: "sampling/train", "verifying/val".

    Attributes:
        counts: responses and tokens by stream, updates, skipped updates.
        phases: seconds by phase; `spent` has them up to now, with "other".
        peaks: looks at the memory of each phase, as long as it is there.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.phases: dict[str, float] = {}
        self.peaks: Peaks | None = None
        self._earlier = 0.0  # seconds of the runs this one resumes
        self._stack: list[str] = []
        self._start = self._mark = time.perf_counter()

    def start(self) -> None:
        """Starts the clock; called once, when the run begins."""
        self._start = self._mark = time.perf_counter()

    def drew(self, stream: str, lengths: list[int]) -> None:
        """Books sampled responses.

        Args:
            stream: "train", "pilot" or "val"; "ahead" of those that are not trained on yet.
            lengths: tokens of each response.
        """
        self.counts[f"responses/{stream}"] += len(lengths)
        self.counts[f"tokens/{stream}"] += sum(lengths)

    def moved(self, stream: str, to: str, lengths: list[int]) -> None:
        """Books responses of one stream under another."""
        self.counts[f"responses/{stream}"] -= len(lengths)
        self.counts[f"tokens/{stream}"] -= sum(lengths)
        self.drew(to, lengths)

    def updated(self, skipped: str | None) -> None:
        """Books an optimizer step, or the reason it was skipped for ("empty", "non_finite")."""
        self.counts[f"skipped/{skipped}" if skipped else "updates"] += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._settle()
        self._stack.append(name)
        try:
            with HERE.inside(name):
                yield
        finally:
            self._settle()
            self._stack.pop()

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._stack:
            name = self._stack[-1]
            self.phases[name] = self.phases.get(name, 0.0) + now - self._mark
            if self.peaks is not None:
                self.peaks.note(name)
        self._mark = now

    @property
    def responses(self) -> int:
        return sum(self.counts[f"responses/{stream}"] for stream in PAID)

    @property
    def tokens(self) -> int:
        return sum(self.counts[f"tokens/{stream}"] for stream in PAID)

    @property
    def updates(self) -> int:
        return self.counts["updates"]

    @property
    def seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._start

    def spent(self) -> dict[str, float]:
        """Seconds so far by phase, and "other": all the rest. They sum to `seconds`."""
        self._settle()
        seconds = self._earlier + self._mark - self._start
        return dict(sorted(self.phases.items())) | {"other": seconds - sum(self.phases.values())}

    def share(self, phase: str) -> float:
        """Share of all seconds spent so far in a phase, or in all phases of a stream ("pilot")."""
        spent = self.spent()
        mine = (value for name, value in spent.items() if phase in (name, name.partition("/")[2]))
        return sum(mine) / max(sum(spent.values()), 1e-9)

    def row(self) -> dict[str, float | int]:
        """Cumulative totals; columns that hold times start with `time/`."""
        spent = self.spent()
        counts = dict(sorted(self.counts.items()))
        times = {f"time/{name}": value for name, value in spent.items()}
        totals = {"responses": self.responses, "tokens": self.tokens, "updates": self.updates}
        return totals | counts | times | {"time/seconds": sum(spent.values())}

    def exceeded(self, limits: Limits) -> str | None:
        """The stop rule that has been met, as `name=value`, or None."""
        for name, limit in vars(limits).items():
            if limit is not None and getattr(self, name.removeprefix("max_")) >= limit:
                return f"limits.{name}={limit}"
        return None

    def state_dict(self) -> dict[str, Any]:
        seconds = sum(self.spent().values())
        return {"counts": dict(self.counts), "phases": dict(self.phases), "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there. Checkpoints from before phases had streams keep theirs."""
        self.counts, self.phases = Counter(state["counts"]), dict(state["phases"])
        self._earlier = state["seconds"]
