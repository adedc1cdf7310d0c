"""`make gpu-check`: one item's end is its own, and what it says is what was found."""

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from rlzoo.bench import gpu_check
from rlzoo.bench._gpu_items import ITEMS, Item
from rlzoo.bench._gpu_place import Failed, Found, Place, made_up, read_report, skewed_lengths
from rlzoo.errors import UserError

LEAVES = "import os, sys; f = sys.argv[1]; open(f + '/found.json', 'w').write({!r})"
ABORTS = "import os; print('CUDA error: an illegal memory access', flush=True); os.abort()"
HANGS = """
import subprocess, sys, time
sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleeping, process_group=0)  # as an item starts its runs
open(sys.argv[1] + "/child", "w").write(str(child.pid))
time.sleep(600)
"""


def left_by(program: str, folder: Path, limit: float = 60) -> gpu_check.Result:
    return gpu_check.in_process([sys.executable, "-c", program, str(folder)], folder, limit)


def test_an_item_that_dies_or_hangs_is_what_is_wrong_and_nothing_of_it_stays(tmp_path):
    folder = tmp_path / "item"
    good = asdict(Found(figures={"gap": 0.01}))
    assert left_by(LEAVES.format(json.dumps(good)), folder) == good
    (wrong,) = left_by(ABORTS, folder)["wrong"]
    assert wrong.startswith("exit code -6: CUDA error: an illegal memory access")
    (wrong,) = left_by(HANGS, folder, limit=4)["wrong"]
    assert wrong.startswith("it took more than 4 s, its limit")
    child = int((folder / "child").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(child).wait(10)  # killed, it may be a moment before it is gone
    assert not psutil.pid_exists(child)


@pytest.mark.parametrize("error, kept", [(Failed("no room"), ["no room"]), (KeyError("x"), None)])
def test_what_an_item_found_before_it_failed_is_kept(error, kept, tmp_path, monkeypatch):
    def fails(place: Place, found: Found) -> None:
        found.figures["gap"] = 0.5
        raise error

    monkeypatch.setitem(ITEMS, 1, Item("it", 60, "Mend it.", fails))
    if kept is None:  # a fault of the item's own: its process ends with a stack trace
        with pytest.raises(KeyError):
            gpu_check.on_item(1, tmp_path, 0)
        assert not (tmp_path / "found.json").exists()
    else:
        gpu_check.on_item(1, tmp_path, 0)
        found = json.loads((tmp_path / "found.json").read_text())
        assert found == {"figures": {"gap": 0.5}, "wrong": kept, "left_out": []}


def test_the_line_of_an_item_says_how_it_ended_and_what_to_do(capsys):
    results = {
        1: asdict(Found(figures={"gap": 0.0123456})),
        2: asdict(Found(figures={"gap": 0.5}, wrong=["the gap is over 0.03 nats"])),
        12: gpu_check.attempt(12, Path("unused"), gpus=1),
    }
    lines = [gpu_check.line_of(n, r | {"seconds": 1.0}) for n, r in results.items()]
    assert lines[0].startswith("ok    1 ") and "gap 0.01235" in lines[0]
    mend = ITEMS[2].mend
    assert (
        lines[1].startswith("FAIL  2 ")
        and f"WRONG: the gap is over 0.03 nats -> {mend}" in lines[1]
    )
    assert lines[2].startswith("none 12 ") and "it needs 2 GPUs, here are 1" in lines[2]
    told = gpu_check.summary(results)
    assert [told[name] for name in ("ok", "failed", "left_out")] == [1, 1, 1]


@pytest.mark.parametrize("only, chosen", [("", [*ITEMS]), ("2, 9", [2, 9])])
def test_items_are_chosen_by_number(only, chosen):
    assert gpu_check.numbers(only) == chosen


def test_an_item_that_there_is_not_is_named():
    with pytest.raises(UserError, match="there is no item '77'"):
        gpu_check.numbers("2,77")


def test_a_report_of_tests_becomes_figures_and_faults(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase name="good"><properties><property name="gap" value="0.25"/></properties>'
        '</testcase><testcase name="bad"><failure message="assert 1 &lt; 0"/></testcase>'
        '<testcase name="absent"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    found = Found()
    assert read_report(report, found) == {"passed": 1, "failed": 1, "skipped": 1}
    assert found.figures == {"gap": 0.25} and found.wrong == ["bad: assert 1 < 0"]


def test_made_up_rollouts_have_the_lengths_of_long_reasoning():
    lengths = skewed_lengths(4096, 688, 3072)
    assert 650 < sorted(lengths)[2048] < 730 and 880 < lengths.mean() < 970
    assert 0.015 < (lengths == 3072).mean() < 0.05
    rollouts = made_up(lengths[:16], 8, 12)
    assert rollouts.lengths.tolist() == lengths[:16].tolist() and len(rollouts.prompts) == 2
