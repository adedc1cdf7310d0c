"""Where this process is, for the other ranks to read: its phase, the exchange that it waits in, and
a count that moves on with either. A run that stands still says so by this (`RankWatch`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Whereabouts:
    """Written by the main thread, read by the thread that gives signs of life.

    Attributes:
        count: moves on with every phase, exchange and unit of work done.
        exchanges: exchanges between ranks begun so far.
        exchange: what the process waits for the others in; "" where it does not.
        listener: called whenever a phase begins or ends, or a unit of work is done.
    """

    def __init__(self) -> None:
        self.count = self.exchanges = 0
        self.exchange = ""
        self.phases: list[str] = []
        self.listener: Callable[[], None] = lambda: None

    def moved(self) -> None:
        self.count += 1
        self.listener()

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        self.phases.append(phase)
        self.moved()
        try:
            yield
        finally:
            self.phases.pop()
            self.moved()

    @contextmanager
    def waiting(self, exchange: str) -> Iterator[None]:
        """For as long as the other ranks may not have come to the same exchange."""
        self.exchange, self.exchanges, self.count = exchange, self.exchanges + 1, self.count + 1
        try:
            yield
        finally:
            self.exchange, self.count = "", self.count + 1

    def __str__(self) -> str:
        phase = self.phases[-1:]  # a copy: the main thread may leave it meanwhile
        inside = f"in phase {phase[0]}" if phase else "between phases"
        if not self.exchange:
            return inside
        return f"waits for the others in {self.exchange} (exchange {self.exchanges}, {inside})"


HERE = Whereabouts()
