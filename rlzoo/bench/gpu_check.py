"""What runs on a GPU alone, tried: a line for each item, with its figures, or what to do.

    make gpu-check                                   # about half an hour of one H100
    python -m rlzoo.bench gpu_check [--only 2,9] [--out FOLDER]

Each item has processes and a time limit of its own, so that what one breaks fails that one alone.
On a CPU it tries what can be tried there, in small, and says what it left out. docs/gpu_check.md
says what each item proves. FOLDER keeps what every item said, and the figures of all in
gpu_check.json. The last line is JSON with
    ok, failed, left_out: numbers of items;
    items: of each, its figures, what is wrong and what was left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from rlzoo.bench._gpu_items import ITEMS
from rlzoo.bench._gpu_place import Failed, Found, Place, last_line
from rlzoo.errors import UserError

LARGE = ("checkpoints", "policy")  # folders that are not kept
Result = dict[str, Any]  # asdict(Found), with "seconds"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench gpu_check")
    parser.add_argument("--only", default="", help="numbers of items, separated by commas")
    parser.add_argument("--out", default=None, help="folder; outputs/gpu_check/TIME if not given")
    parser.add_argument("--item", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if arguments.item is not None:
        on_item(arguments.item, Path(arguments.out), gpus)
        return
    chosen = numbers(arguments.only)
    out = Path(arguments.out or f"outputs/gpu_check/{datetime.now():%Y-%m-%d_%H-%M-%S}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(chosen)} items on {gpus} GPUs; {out} keeps what they say", flush=True)
    found = {number: attempt(number, out, gpus) for number in chosen}
    shutil.rmtree(out / "policy", ignore_errors=True)
    line = summary(found)
    (out / "gpu_check.json").write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))
    if line["failed"]:
        sys.exit(1)


def numbers(only: str) -> list[int]:
    """The items that were asked for; all of them if none was.

    Raises:
        UserError: there is no such item.
    """
    if not only:
        return list(ITEMS)
    asked = [part.strip() for part in only.split(",")]
    known = {str(number): number for number in ITEMS}
    for part in asked:
        if part not in known:
            raise UserError(
                f"--only {only}: there is no item {part!r}. Choose from {', '.join(known)}."
            )
    return [known[part] for part in asked]


def attempt(number: int, out: Path, gpus: int) -> Result:
    """Tries an item in a process of its own, within its time, and prints its line."""
    item, began = ITEMS[number], time.monotonic()
    if item.gpus > gpus:
        result = asdict(Found(left_out=[f"it needs {item.gpus} GPUs, here are {gpus}"]))
    else:
        folder = out / f"item_{number}"
        command = [sys.executable, "-m", "rlzoo.bench", "gpu_check", "--item", str(number)]
        result = in_process([*command, "--out", str(folder)], folder, item.limit)
    result["seconds"] = round(time.monotonic() - began, 1)
    print(line_of(number, result), flush=True)
    return result


def in_process(command: Sequence[str], folder: Path, limit: float) -> Result:
    """What an item's process leaves in its folder; if it dies or hangs, that is what is wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    said = folder / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = f"exit code {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        end = f"it took more than {limit:.0f} s, its limit"
    end_session(process)
    for place in [path for name in LARGE for path in folder.rglob(name)]:
        shutil.rmtree(place, ignore_errors=True)
    result = folder / "found.json"
    if result.exists():
        found: Result = json.loads(result.read_text())
        return found
    return asdict(Found(wrong=[f"{end}: {last_line(said)} ({folder} keeps what it said)"]))


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kills what an item started and left: its runs have process groups of their own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid, after = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            if int(after[3]) == process.pid:
                os.kill(pid, signal.SIGKILL)
    process.wait()


def on_item(number: int, folder: Path, gpus: int) -> None:
    """Tries an item, here, and leaves what it found in its folder."""
    found = Found()
    try:
        ITEMS[number].check(Place(folder, gpus), found)
    except (Failed, UserError) as error:
        found.wrong.append(str(error))
    (folder / "found.json").write_text(json.dumps(asdict(found)))


def line_of(number: int, result: Result) -> str:
    """An item in a line: how it ended, its figures, what is wrong and what to do."""
    item = ITEMS[number]
    figures = ", ".join(f"{name} {shown(value)}" for name, value in result["figures"].items())
    parts = [f"{verdict(result):4} {number:2} {item.what} ({result['seconds']:.0f} s)"]
    parts += [figures] if figures else []
    parts += [f"left out: {'; '.join(result['left_out'])}"] if result["left_out"] else []
    parts += [f"WRONG: {'; '.join(result['wrong'])} -> {item.mend}"] if result["wrong"] else []
    return "\n        ".join(parts)


def verdict(result: Result) -> str:
    if result["wrong"]:
        return "FAIL"
    return "ok" if result["figures"] else "none"


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def summary(found: Mapping[int, Result]) -> dict[str, Any]:
    ends = [verdict(result) for result in found.values()]
    counts = {"ok": ends.count("ok"), "failed": ends.count("FAIL"), "left_out": ends.count("none")}
    return counts | {"items": {str(number): result for number, result in found.items()}}


if __name__ == "__main__":
    main(sys.argv[1:])
