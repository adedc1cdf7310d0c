"""Plants each fault of planted.yaml in a copy of the repository and runs what must notice.

    python tests/planted.py [WORDS] [-j JOBS]     # only faults whose description has these words

Prints a line per fault and how many of them were noticed, and ends with exit code 1 if one was not.
It takes some seconds a fault, so it is no part of the default test run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import deepspeed  # noqa: F401  what the tests import, once for all of them
import lightning.pytorch  # noqa: F401
import peft  # noqa: F401
import pytest
import torch
import transformers.trainer_utils  # noqa: F401
import yaml
from transformers.models.qwen2 import modeling_qwen2, tokenization_qwen2  # noqa: F401

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_name("planted.yaml")


def planted(source: str, old: str, new: str) -> str:
    """The source with the fault in it.

    Raises:
        ValueError: what is to be replaced does not stand there exactly once.
    """
    if source.count(old) != 1:
        raise ValueError(f"{old!r} stands there {source.count(old)} times")
    return source.replace(old, new)


def start(copy: Path, tests: str) -> int:
    """Process of pytest in the copy, forked from this one with the imports behind it."""
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)
    output = os.open(copy.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    ours = (str(ROOT), str(ROOT / "tests"))
    sys.path[:] = [str(copy), *(place for place in sys.path if place not in ours)]
    torch.set_num_threads(1)
    code = pytest.main(["-xq", "-n", "0", "-p", "no:cacheprovider", *tests.split()])
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="?", default="", help="of the faults' descriptions")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    options = parser.parse_args()
    faults = [fault for fault in yaml.safe_load(FAULTS.read_text()) if options.words in fault[0]]
    waiting, noticed = faults[::-1], 0
    running: dict[int, tuple[Path, str, Path, str]] = {}  # process: copy, fault, file, its source
    with tempfile.TemporaryDirectory() as folder:
        free = [Path(folder) / str(job) / "rlzoo" for job in range(options.jobs)]
        for copy in free:
            ignored = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info")
            shutil.copytree(ROOT, copy, ignore=ignored)
        while waiting or running:
            while waiting and free:
                what, file, old, new, tests = waiting.pop()
                copy = free.pop()
                path = copy / "rlzoo" / file
                source = path.read_text()
                path.write_text(planted(source, old, new))
                running[start(copy, tests)] = copy, what, path, source
            pid, status = os.wait()
            copy, what, path, source = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1):
                said = copy.with_suffix(".txt").read_text()
                raise RuntimeError(f"pytest ended with exit code {code} on {what}:\n{said[-3000:]}")
            path.write_text(source)
            free.append(copy)
            noticed += code
            print("red  " if code else "GREEN", what, flush=True)
    print(f"{noticed} of {len(faults)} faults were noticed")
    sys.exit(noticed < len(faults))


if __name__ == "__main__":
    main()
