"""Says whether the virtual environment holds what a lock asks for: requirements/cpu.txt, or the one
that it is given.

Run by `make venv` with the environment's own Python; needs no package. Exits 1, with one
message, where torch is not the one locked, and warns about what `pip check` finds.
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU = Path(__file__).with_name("cpu.txt")
LEFT_OUT = Path(__file__).with_name("left_out.txt")
MEND = (
    "Name a package index, or a folder of wheels, that has the CPU build of torch:\n"
    "    make venv PIP_ARGS='--extra-index-url URL'\n"
    "    make venv PIP_ARGS='--find-links FOLDER'"
)


CUDA_MEND = "Take away .venv and make it anew: make venv REQUIREMENTS=requirements/cuda.txt"


def locked_version(package: str, lock: Path) -> str:
    """The version that the lock pins `package` to; ValueError where it pins none."""
    match = re.search(rf"^{re.escape(package)}==(\S+)", lock.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{lock} pins no {package}: make the lock anew with `make lock`.")
    return match[1]


def torch_problem(lock: Path) -> str | None:
    """One message where torch is not the one locked or does not import, else None."""
    wanted = locked_version("torch", lock)
    mend = CUDA_MEND if lock.name == "cuda.txt" else MEND
    try:
        found = version("torch")
    except PackageNotFoundError:
        return f"torch {wanted} is locked, but .venv holds no torch.\n{mend}"
    if found.partition("+")[0] != wanted or (mend is CUDA_MEND and "+cpu" in found):
        return f"torch {wanted} is locked, but .venv holds torch {found}.\n{mend}"
    # In a process of its own: a build for another machine may also die of a signal.
    probe = subprocess.run(
        [sys.executable, "-c", "import torch"], capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        guess = "It is probably the CUDA build, whose libraries the CPU lock leaves out.\n"
        return (
            f"torch {found} is installed but cannot be imported ({reason}).\n"
            f"{guess if mend is MEND else ''}{mend}"
        )
    return None


def main() -> int:
    lock = Path(sys.argv[1]) if len(sys.argv) > 1 else CPU
    problem = torch_problem(lock)
    if problem is not None:
        print(f"\nmake venv: {problem}", file=sys.stderr)
        return 1
    pip_check = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    left_out = LEFT_OUT.read_text().splitlines() if lock.name == "cpu.txt" else []
    expected = [line for line in left_out if not line.startswith("#")]
    missing = tuple(f"requires {name}, which is not installed." for name in expected)
    problems = [line for line in pip_check.stdout.splitlines() if not line.endswith(missing)]
    if pip_check.returncode != 0 and problems:
        print("make venv: warning, pip check found:", *problems, sep="\n", file=sys.stderr)
    print(f".venv is ready: torch {version('torch')}, as locked.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
