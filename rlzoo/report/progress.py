"""What a run shows while it works: bars for the phases of a rollout step, then a line on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from rlzoo.ranks.whereabouts import HERE
from rlzoo.report.columns import AVG, validated_ks

HEADER_EVERY = 20  # step lines: the header then stays within one screen

# Titles are staggered over two rows, since most are wider than the numbers below them.
TITLES = (
    "    reward{:>12}           KL        length     degen. budget",
    "step      accept     entropy        clip  mean/max  cut      lo/avg/hi",
)
SPEEDS = {  # by whether MFU is known, for which seconds then make room
    False: ("  sample     score      plan", "    verify     train     tok/s"),
    True: (" sample   score    plan       MFU", "  verify   train    tok/s"),
}


def header(k: int, mfu: bool = False) -> list[str]:
    """The two rows of titles of a run that validates with k responses a prompt."""
    rows = (left + right for left, right in zip(TITLES, SPEEDS[mfu], strict=True))
    return [row.format(f"val avg@{k}") for row in rows]


class Bars:
    """Live bars for nested phases, with lines printed above them.

    On a terminal, each running phase has a bar with its count, rate and time, gone when the phase
    ends. Where the output is no terminal only the lines are printed, without control codes.

    Args:
        enabled: False on ranks other than 0, which then print nothing.
        console: where to print; standard output unless given.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled = enabled
        self.k = 8  # of avg@k: the run sets its own
        self.mfu = False  # whether the table has it: from the first row on that does
        self._console = console or Console()
        self._live = enabled and self._console.is_terminal
        self._depth = 0
        self._lines = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Shows a bar while the block runs.

        Args:
            name: such as "sampling"; a phase within a phase is indented.
            total: units of work in all.
            unit: what is counted, in the plural, such as "responses".

        Yields:
            advance(n): call it when n more units are done.
        """
        if not self._live:
            yield lambda n: HERE.moved()
            return
        description = "  " * self._depth + name
        task = self._progress.add_task(description, total=total, unit=unit)
        self._depth += 1

        def advance(n: int) -> None:
            HERE.moved()
            self._progress.advance(task, n)

        self._progress.start()  # nothing happens if an outer phase has started it
        try:
            yield advance
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._progress.stop()
            self._progress.remove_task(task)

    def print_step(self, metrics: Mapping[str, float]) -> None:
        """Prints one rollout step's line (`step_line`), with the header now and then."""
        for k in validated_ks(metrics):
            self.k = k
        new = "time/mfu" in metrics and not self.mfu
        self.mfu = self.mfu or new
        if self._lines % HEADER_EVERY == 0 or new:
            for line in header(self.k, self.mfu):
                self.print_line(line, style="bold")
        self._lines += 1
        self.print_line(step_line(metrics, self.mfu))

    def print_line(self, text: str, style: str = "") -> None:
        """Prints text above the bars as it is: no markup, no wrapping, colours only if styled."""
        if self.enabled:
            # A Text, because print(style=...) would colour the live bars below it too.
            self._console.print(Text(text, style=style), soft_wrap=True)


class _RateColumn(ProgressColumn):
    """Units done per second since the phase began."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        rate = task.completed / task.elapsed if task.elapsed else 0.0
        return Text(f"{rate:,.1f} {unit}/s")


def step_line(metrics: Mapping[str, float], mfu: bool = False) -> str:
    """One rollout step in 100 columns, under `header`; a missing or NaN metric is a dash.

    Shares (`accept_rate`, `val/avg_at_K`, `clip_fraction`, `truncated`, `degenerate_groups`) are
    shown in percent, `entropy` and `approx_kl` in nats, lengths in tokens, budgets in responses
    per prompt, the phases in seconds: `sample` and `verify` of the training responses, `plan` with
    all that pilots cost.

    Args:
        mfu: whether there is a column for it, in percent; seconds then stand without their unit,
            and from 1,000 on as minutes.
    """
    metrics = {**metrics, **of_any_name(metrics)}

    def show(name: str, form: Callable[[float], str]) -> str:
        value = metrics.get(name)
        return "-" if value is None or math.isnan(value) else form(value)

    lengths = f"{show('length/mean', _WHOLE)}/{show('length/max', _WHOLE)}"
    budgets = (
        f"{show('budget/min', _WHOLE)}/{show('budget/mean', _BUDGET)}/{show('budget/max', _WHOLE)}"
    )
    seconds, wide = (_short_seconds, 3) if mfu else (_SECONDS, 4)
    cells = [
        (4, show("rollout_step", _WHOLE)),
        (5, show("reward", _reward)),
        (5, show("accept_rate", _PERCENT)),
        (5, show("val/avg", _PERCENT)),
        (5, show("entropy", _form(3))),
        (6, show("approx_kl", _KL)),
        (4, show("clip_fraction", _SHORT_PERCENT)),
        (9, "-" if lengths == "-/-" else lengths),
        (4, show("truncated", _SHORT_PERCENT)),
        (4, show("degenerate_groups", _SHORT_PERCENT)),
        (9, "-" if budgets == "-/-/-" else budgets),
        (wide, show("sample", seconds)),
        (wide, show("time/verifying/train", seconds)),
        (wide, show("time/scoring", seconds)),
        (wide, show("time/training", seconds)),
        (wide, show("plan", seconds)),
        (4, show("time/tokens_per_second", _rate)),
    ]
    if mfu:
        cells.append((4, show("time/mfu", _SHORT_PERCENT)))
    return " ".join(text.rjust(width) for width, text in cells)


def of_any_name(metrics: Mapping[str, float]) -> dict[str, float]:
    """`val/avg`, avg@k whatever the k is; `plan`, seconds of planning and of pilots; `sample`, of
    drawing, or of waiting for what was drawn beside training."""
    validated = [metrics[f"{AVG}{k}"] for k in validated_ks(metrics)]
    times = {name: value for name, value in metrics.items() if name.startswith("time/")}
    plan = [v for name, v in times.items() if name == "time/planning" or name.endswith("/pilot")]
    drawn = [v for n, v in times.items() if n in ("time/sampling/train", "time/waiting/ahead")]
    found = {"val/avg": validated[-1:], "plan": plan, "sample": drawn}
    return {name: sum(values) for name, values in found.items() if values}


def _form(
    decimals: int, limit: float = math.inf, fewer: int = 0, unit: str = "", scale: int = 1
) -> Callable[[float], str]:
    """Writes a value with so many decimals, or with fewer from a limit on, to keep its column."""
    return lambda value: f"{scale * value:.{decimals if value < limit else fewer}f}{unit}"


_WHOLE = _form(0)
_BUDGET = _form(1, 9.95)
_KL = _form(4, 9.99995, 1)
_PERCENT = _form(1, 0.9995, unit="%", scale=100)
_SHORT_PERCENT = _form(1, 0.0995, unit="%", scale=100)
_SECONDS = _form(1, 9.95, unit="s")


def _short_seconds(value: float) -> str:
    return f"{value:.{1 if value < 9.95 else 0}f}" if value < 999.5 else f"{value / 60:.0f}m"


def _reward(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else f"{value:.2f}"  # the sign takes a decimal's place


def _rate(value: float) -> str:
    return f"{value:.0f}" if value < 9999.5 else f"{value / 1000:.0f}k"
