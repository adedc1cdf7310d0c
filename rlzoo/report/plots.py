"""The picture a run leaves behind: its learning curve and how its budgets were spread."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from rlzoo.errors import UserError
from rlzoo.report.columns import AVG, PASS, validated_ks

BLUE, LIGHT_BLUE, GREEN, ORANGE = "#1f5fa8", "#7fb0de", "#3a9a5b", "#e07b28"
GREY, DARK = "#8a8f98", "#2b2f36"
MAX_BARS = 40  # a histogram with more bars is no easier to read at 1200 pixels


def plot_run(run_dir: Path, labels: Mapping[str, object] | None = None) -> Path:
    """Plots `run_dir/learning.png`, 1200 x 500 pixels.

    Left, validation avg@k and pass@k, for every k that the run had, and training acceptance
    against responses drawn, from `metrics.csv`; right, the budgets of the first and the last
    epoch, from `budgets/*.parquet`, left out when there are none.

    Args:
        run_dir: a run's directory.
        labels: what the title says, in order, such as {"algo": "grpo", "sampler": "gvm",
            "model": "tiny", "seed": 0}; the directory's name without them.

    Returns:
        The path of the picture.

    Raises:
        UserError: `metrics.csv` is missing, empty or has no column `responses`.
    """
    run_dir = Path(run_dir)
    columns = _read_metrics(run_dir / "metrics.csv")
    budgets = _read_budgets(run_dir / "budgets")
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    if budgets:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _plot_budgets(right, budgets)
    else:
        left = figure.subplots()
    _plot_curve(left, columns)
    named = labels.items() if labels else [("run", run_dir.resolve().name)]
    title = "  ·  ".join(f"{name} {value}" for name, value in named)
    figure.suptitle(title, fontsize=13, color=DARK)
    path = run_dir / "learning.png"
    figure.savefig(path)
    return path


def _read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns by name, [rows] float64 each, NaN where a cell is empty."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist, so there is nothing to draw: run with logger=default or"
            " logger=csv, or name the directory of such a run."
        )
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "responses" not in rows[0]:
        raise UserError(
            f"{path} holds {len(rows)} rows and {'no' if not rows else len(rows[0])} columns;"
            " a picture needs at least one row and the column `responses`. Let the run finish"
            " one rollout step first."
        )
    wanted = ["responses", "accept_rate"]
    for k in validated_ks(rows[0]):
        wanted += [f"{AVG}{k}", f"{PASS}{k}"]
    return {name: np.array([float(row.get(name) or math.nan) for row in rows]) for name in wanted}


def _read_budgets(folder: Path) -> dict[int, np.ndarray]:
    """Budgets of the first and last epoch found, [P] each, by epoch."""
    epochs: dict[int, np.ndarray] = {}
    for path in sorted(folder.glob("epoch_*.parquet")):
        if not re.fullmatch(r"epoch_\d{4,}", path.stem):  # someone else's
            continue
        table = pq.read_table(path, columns=["epoch", "budget"])
        if table.num_rows:
            epochs[table["epoch"][0].as_py()] = table["budget"].to_numpy()
    return {epoch: epochs[epoch] for epoch in sorted({min(epochs), max(epochs)})} if epochs else {}


def _plot_curve(axes: Axes, columns: dict[str, np.ndarray]) -> None:
    responses = columns["responses"]
    _plot_acceptance(axes, responses, columns["accept_rate"])
    ks = [k for k in validated_ks(columns) if np.isfinite(columns[f"{AVG}{k}"]).any()]
    for k in ks:  # more than one after a resume with another k
        _plot_validation(axes, responses, columns, k, "white" if k != ks[0] else None)
    axes.set_ylim(0, 1.06)
    axes.margins(x=0.08)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("responses drawn")
    axes.set_ylabel("solved")
    if axes.get_legend_handles_labels()[0]:
        # Above the axes, where no curve can run through it.
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3)
    _finish(axes)


def _plot_validation(
    axes: Axes, responses: np.ndarray, columns: dict[str, np.ndarray], k: int, fill: str | None
) -> None:
    """avg@k and pass@k, from the rows that validated with k responses; of k = 1 they are one.

    Args:
        fill: colour of the markers, their line's if None.
    """
    curves = [(AVG, f"validation avg@{k}", BLUE, "o-")]
    if k > 1:
        curves.insert(0, (PASS, f"validation pass@{k}", LIGHT_BLUE, "s--"))
    for prefix, label, color, style in curves:
        known = np.isfinite(columns[f"{AVG}{k}"]) & np.isfinite(columns[f"{prefix}{k}"])
        known &= np.isfinite(responses)
        x, y = responses[known], columns[f"{prefix}{k}"][known]
        if not len(x):
            continue
        (line,) = axes.plot(x, y, style, color=color, label=label, linewidth=2, markersize=5)
        line.set(zorder=3, markerfacecolor=fill)
        for i in sorted({0, len(x) - 1}):
            axes.annotate(
                f"{y[i]:.1%}",
                (x[i], y[i]),
                # Below the first point and above the last: a curve that rises stays clear of both.
                xytext=(0, 8 if i else -17),
                textcoords="offset points",
                ha="center",
                color=color,
                weight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                zorder=4,
            )


def _plot_acceptance(axes: Axes, responses: np.ndarray, accept_rate: np.ndarray) -> None:
    """Each rollout step's acceptance as a dot, and a running mean over about a tenth of them."""
    known = np.isfinite(accept_rate) & np.isfinite(responses)
    x, y = responses[known], accept_rate[known]
    if not len(x):
        return
    axes.plot(x, y, ".", color=GREEN, alpha=0.35, markersize=5)
    half = len(x) // 20
    smooth = [y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))]
    axes.plot(x, smooth, "-", color=GREEN, linewidth=1.5, label="training acceptance")


def _plot_budgets(axes: Axes, budgets: dict[int, np.ndarray]) -> None:
    """Histograms of responses per prompt, side by side; one bar where budgets are uniform."""
    highest = max(int(values.max()) for values in budgets.values())
    lowest = min(int(values.min()) for values in budgets.values())
    width = math.ceil((highest - lowest + 1) / MAX_BARS)
    edges = np.arange(lowest, highest + width + 1, width) - 0.5  # bars hold whole budgets
    if lowest == highest:
        shown = {f"{lowest} for every prompt": budgets[max(budgets)]}
        axes.set_xlim(lowest - 3, highest + 3)
    else:
        shown = {
            f"epoch {epoch}: mean {values.mean():.1f}, max {values.max()}": values
            for epoch, values in budgets.items()
        }
    colors = (GREY, ORANGE)[-len(shown) :]
    values, labels = list(shown.values()), list(shown)
    axes.hist(values, bins=edges.tolist(), color=colors, rwidth=0.9, label=labels)
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, loc="upper right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("budget (responses per prompt)")
    axes.set_ylabel("prompts")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=DARK)
