import io
import math

import pytest
from rich.console import Console

from rlzoo.report.progress import HEADER_EVERY, Bars, header, step_line

HEADER = header(8)

FULL = {
    "rollout_step": 1234,
    "reward": -0.2312,
    "accept_rate": 1.0,
    "val/avg_at_8": 0.9996,  # of any k
    "entropy": 0.4123,
    "approx_kl": 12.34,
    "clip_fraction": 0.123,
    "length/mean": 1870.2,
    "length/max": 3072,
    "truncated": 1.0,
    "degenerate_groups": 0.345,
    "budget/min": 10,
    "budget/mean": 16.2,
    "budget/max": 128,
    "time/sampling/train": 555.2,
    "time/sampling/val": 333.3,  # of no column
    "time/verifying/train": 9.96,
    "time/scoring": 50.8,
    "time/training": 12.3,
    "time/planning": 0.01,
    "time/sampling/pilot": 0.02,
    "time/verifying/pilot": 0.01,
    "tokens/pilot": 1000,
    "time/tokens_per_second": 123456.0,
}


def bars(terminal: bool, enabled: bool = True) -> tuple[Bars, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return Bars(enabled=enabled, console=console), out


def run_phases(shown: Bars) -> None:
    with shown.phase("sampling", 8, "responses") as sampled:
        sampled(5)
        with shown.phase("verifying", 2, "answers") as verified:
            verified(2)
        shown.print_step({"rollout_step": 0})
        sampled(3)


def test_a_step_line_shows_each_metric_in_its_unit():
    line = step_line({**FULL, "rollout_step": 7, "reward": 0.2312, "approx_kl": 0.00012})
    assert (
        line.split()
        == (
            "7 0.231 100% 100% 0.412 0.0001 12% 1870/3072 100% 34% 10/16/128"
            " 555s 10s 51s 12s 0.0s 123k"
        ).split()
    )


@pytest.mark.parametrize("k", [1, 3, 16, 1024])
def test_avg_at_k_is_of_the_runs_own_k_in_title_and_line(k: int):
    shown, out = bars(terminal=False)
    shown.print_step({"rollout_step": 0, f"val/avg_at_{k}": 0.423, "val/pass_at_8": 0.9})
    *titles, line = out.getvalue().splitlines()
    end = titles[0].index(f"val avg@{k}") + len(f"val avg@{k}")
    assert line[:end].split()[-1] == "42.3%" and line[end] == " "
    assert titles[1] == HEADER[1] and len(titles[0]) == len(HEADER[0])


def test_the_title_of_a_run_that_has_not_validated_yet_is_that_of_its_k():
    shown, out = bars(terminal=False)
    shown.k = 4
    shown.print_step({"rollout_step": 7})
    assert "val avg@4 " in out.getvalue() and "avg@8" not in out.getvalue()


def test_missing_and_nan_metrics_are_dashes():
    line = step_line({"rollout_step": 3, "reward": math.nan})
    assert line.split() == ["3"] + ["-"] * 16


def test_wide_and_empty_lines_fit_one_hundred_columns_and_align_with_the_header():
    full, empty = step_line(FULL), step_line({})
    assert len(full) == len(empty) == max(map(len, HEADER)) == 100
    for title in ("reward", "val avg@8", "KL", "degen.", "sample", "score", "plan"):
        end = HEADER[0].index(title) + len(title)
        assert full[end - 1] != " " and full[end] == " ", title
    for title in ("step", "accept", "entropy", "clip", "mean/max", "cut", "lo/avg/hi", "train"):
        end = HEADER[1].index(title) + len(title)
        assert full[end - 1] != " " and full[end] == " ", title


def test_mfu_has_a_column_once_it_is_known():
    known = {**FULL, "time/mfu": 0.412, "time/training": 1234.0}
    line, titles = step_line(known, mfu=True), header(1024, mfu=True)
    assert line.split()[-7:] == "555 10 51 21m 0.0 123k 41%".split()
    assert len(line) == len(step_line({}, mfu=True)) == len(titles[0]) == 100
    named = (("sample", "score", "plan", "MFU"), ("verify", "train", "tok/s"))
    for row, names in zip(titles, named, strict=True):
        for title in names:
            end = row.index(title) + len(title)
            assert line[end - 1] != " " and (line + " ")[end] == " ", title
    shown, out = bars(terminal=False)
    for metrics in (FULL, known, FULL):
        shown.print_step(metrics)
    lines = out.getvalue().splitlines()
    assert "MFU" not in lines[0] and "MFU" in lines[3] and lines[5].endswith("41%")
    assert lines[6].endswith("123k    -") and len(lines) == 7


@pytest.mark.parametrize("value", [0.0, 0.0994, 0.0996, 0.5, 0.9994, 0.9996, 1.0])
def test_no_share_breaks_the_alignment(value: float):
    shares = ("accept_rate", "val/avg_at_8", "clip_fraction", "truncated", "degenerate_groups")
    assert len(step_line(dict.fromkeys(shares, value))) == 100


def test_off_a_terminal_only_the_step_lines_are_printed():
    shown, out = bars(terminal=False)
    run_phases(shown)
    assert out.getvalue() == "\n".join([*HEADER, step_line({"rollout_step": 0})]) + "\n"


def test_other_ranks_print_nothing_even_on_a_terminal():
    shown, out = bars(terminal=True, enabled=False)
    run_phases(shown)
    shown.print_line("done")
    assert out.getvalue() == ""


def test_on_a_terminal_nested_bars_are_drawn_with_count_and_rate_and_then_erased():
    shown, out = bars(terminal=True)
    run_phases(shown)
    text = out.getvalue()
    assert "sampling" in text and "  verifying" in text and "responses/s" in text
    last_bar = text.rindex("8/8")
    assert "\x1b[2K" in text[last_bar:]  # its line is erased
    assert text.endswith("\x1b[2K")
    assert step_line({"rollout_step": 0}) in text


def test_bars_come_back_for_the_next_phase_and_go_when_one_fails():
    shown, out = bars(terminal=True)
    run_phases(shown)
    with pytest.raises(RuntimeError), shown.phase("scoring", 4, "microbatches"):
        raise RuntimeError
    out.seek(0)
    out.truncate()
    with shown.phase("training", 4, "microbatches") as advance:
        advance(4)
    assert "training" in out.getvalue() and "4/4" in out.getvalue()
    assert "scoring" not in out.getvalue() and "sampling" not in out.getvalue()


def test_the_header_is_repeated_every_so_many_steps():
    shown, out = bars(terminal=False)
    for i in range(HEADER_EVERY + 1):
        shown.print_step({"rollout_step": i})
    lines = out.getvalue().splitlines()
    assert [i for i, line in enumerate(lines) if line == HEADER[0]] == [0, HEADER_EVERY + 2]


def test_text_with_brackets_is_printed_as_it_is():
    shown, out = bars(terminal=False)
    shown.print_line("took [bold]12[/bold] s " + "x" * 200)
    assert out.getvalue() == "took [bold]12[/bold] s " + "x" * 200 + "\n"
