"""Plants each fault of planted.yaml in a copy of rlzoo and runs the tests that must notice.

    python tests/planted.py [WORDS]     # only the faults whose description has these words

Prints a line per fault, and ends with exit code 1 if one went unnoticed. It takes about ten
seconds a fault, so it is no part of the default test run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

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


def noticed(copy: Path, tests: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-xq", "-n", "0", "-p", "no:cacheprovider"]
    command += tests.split()
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with exit code {code} on {tests}")
    return code == 1


def main(words: str = "") -> None:
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "rlzoo"
        ignored = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for what, file, old, new, tests in yaml.safe_load(FAULTS.read_text()):
            if words in what:
                path = copy / "rlzoo" / file
                source = path.read_text()
                path.write_text(planted(source, old, new))
                red = noticed(copy, tests)
                path.write_text(source)
                unnoticed += not red
                print("red  " if red else "GREEN", what, flush=True)
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main(*sys.argv[1:2])
