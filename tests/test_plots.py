from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

import rlzoo.report.plots
from rlzoo.errors import UserError
from rlzoo.report.loggers import CSVLogger
from rlzoo.report.plots import plot_run

LABELS = {"algo": "grpo", "sampler": "gvm", "model": "tiny", "seed": 0}


def write_metrics(
    run_dir: Path, num_steps: int, val_every: int = 2, k: int = 8, later_k: int | None = None
) -> None:
    """Rows of a run that validates with k responses, and from step 3 on, resumed, with later_k."""
    logger = CSVLogger(run_dir)
    for i in range(num_steps + 1):
        row: dict[str, float] = {"rollout_step": i, "responses": 256 * i}
        if i > 0:
            row["accept_rate"] = 0.2 + 0.1 * i
        if i % val_every == 0:
            mine = later_k if later_k and i > 2 else k
            row |= {f"val/avg_at_{mine}": 0.25 + 0.1 * i, f"val/pass_at_{mine}": 0.5 + 0.1 * i}
            row |= {"val/pass_at_1": 0.25 + 0.1 * i}
        logger.log_metrics(row)
    logger.finalize("success")


def write_budgets(run_dir: Path, budgets: dict[int, list[int]]) -> None:
    (run_dir / "budgets").mkdir()
    for epoch, values in budgets.items():
        table = pa.table({"budget": values, "epoch": [epoch] * len(values)})
        pq.write_table(table, run_dir / "budgets" / f"epoch_{epoch:04d}.parquet")


def plot_and_keep(run_dir: Path, monkeypatch: pytest.MonkeyPatch, **kwargs: object) -> Figure:
    """The figure behind the picture, the picture written too."""
    kept: list[Figure] = []

    class KeptFigure(Figure):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            kept.append(self)

    monkeypatch.setattr(rlzoo.report.plots, "Figure", KeptFigure)
    plot_run(run_dir, **kwargs)
    return kept[0]


def curve(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def bar_heights(axes: Axes) -> list[list[float]]:
    return [[bar.get_height() for bar in group if bar.get_height()] for group in axes.containers]


def test_the_picture_is_1200_by_500_and_not_blank(tmp_path: Path):
    write_metrics(tmp_path, num_steps=6)
    write_budgets(tmp_path, {0: [0, 1, 2, 9], 1: [4, 4, 4, 0]})
    path = plot_run(tmp_path, LABELS)
    assert path == tmp_path / "learning.png"
    pixels = imread(path)
    assert pixels.shape[:2] == (500, 1200)
    assert np.ptp(pixels[:, :600, :3]) > 0.5 and np.ptp(pixels[:, 800:, :3]) > 0.5


def test_validation_is_drawn_at_its_own_rows_against_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_metrics(tmp_path, num_steps=4)
    figure = plot_and_keep(tmp_path, monkeypatch, labels=LABELS)
    (axes,) = figure.axes
    x, y = curve(axes, "validation avg@8")
    assert x == [0, 512, 1024] and y == pytest.approx([0.25, 0.45, 0.65])
    x, y = curve(axes, "training acceptance")
    assert x == [256, 512, 768, 1024] and y == pytest.approx([0.3, 0.4, 0.5, 0.6])
    assert "25.0%" in [text.get_text() for text in axes.texts]
    title = figure.get_suptitle()
    assert all(word in title for word in ("algo grpo", "sampler gvm", "model tiny", "seed 0"))


@pytest.mark.parametrize("k", [1, 3, 8, 32])
def test_the_validation_of_any_k_is_drawn_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
):
    write_metrics(tmp_path, num_steps=4, k=k)
    (axes,) = plot_and_keep(tmp_path, monkeypatch).axes
    assert curve(axes, f"validation avg@{k}")[1] == pytest.approx([0.25, 0.45, 0.65])
    names = {line.get_label() for line in axes.get_lines() if "@" in line.get_label()}
    wanted = {f"validation avg@{k}", f"validation pass@{k}"}
    assert names == (wanted if k > 1 else {"validation avg@1"})  # pass@1 would be the same curve


def test_a_run_resumed_with_another_k_has_a_curve_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_metrics(tmp_path, num_steps=6, later_k=2)
    (axes,) = plot_and_keep(tmp_path, monkeypatch).axes
    assert curve(axes, "validation avg@8") == ([0, 512], pytest.approx([0.25, 0.45]))
    assert curve(axes, "validation avg@2") == ([1024, 1536], pytest.approx([0.65, 0.85]))
    assert curve(axes, "validation pass@2")[0] == [1024, 1536]


def test_first_and_last_epoch_are_the_two_histograms_even_past_epoch_9(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_metrics(tmp_path, num_steps=1)
    write_budgets(tmp_path, {0: [1, 1, 2], 2: [7, 7, 7], 9: [8, 8, 8], 10: [3, 3, 3]})
    axes = plot_and_keep(tmp_path, monkeypatch).axes[1]
    assert bar_heights(axes) == [[2, 1], [3]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "epoch 0: mean 1.3, max 2",
        "epoch 10: mean 3.0, max 3",
    ]


def test_uniform_budgets_are_a_single_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_metrics(tmp_path, num_steps=1)
    write_budgets(tmp_path, {0: [4] * 10, 1: [4] * 10})
    axes = plot_and_keep(tmp_path, monkeypatch).axes[1]
    assert [patch.get_height() for patch in axes.patches] == [10]
    (bar,) = axes.patches
    assert bar.get_x() + bar.get_width() / 2 == pytest.approx(4)


def test_a_wide_spread_is_counted_whole_in_at_most_40_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_metrics(tmp_path, num_steps=1)
    write_budgets(tmp_path, {0: list(range(0, 1000)), 1: [999] * 5})
    axes = plot_and_keep(tmp_path, monkeypatch).axes[1]
    assert [sum(heights) for heights in bar_heights(axes)] == [1000, 5]
    assert 30 < len(axes.containers[0]) <= 40


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_run_with_one_validation_and_no_budgets_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
):
    write_metrics(tmp_path, num_steps, val_every=100)
    figure = plot_and_keep(tmp_path, monkeypatch)
    (axes,) = figure.axes
    assert curve(axes, "validation avg@8") == ([0], [0.25])
    assert tmp_path.name in figure.get_suptitle()


def test_a_run_without_metrics_is_refused_with_the_file_and_the_mend(tmp_path: Path):
    with pytest.raises(UserError, match="metrics.csv does not exist.*logger=csv"):
        plot_run(tmp_path)
    (tmp_path / "metrics.csv").write_text("responses\n")
    with pytest.raises(UserError, match="holds 0 rows"):
        plot_run(tmp_path)
