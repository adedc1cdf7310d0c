"""Makes requirements/cuda.txt from cuda.in without installing anything, and checks it.

    make lock-cuda

pip resolves from metadata alone (`--dry-run`), away from local wheels, among which a CPU build of
torch may lie; then it resolves the lock itself, which must give the same packages. `--check` does
only the second.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
LOCK = FOLDER / "cuda.txt"
HEAD = (
    "# Made by make lock-cuda from requirements/cuda.in: complete, so install it with --no-deps.\n"
)


def resolved(requirements: Path) -> dict[str, str]:
    """Package to version, as pip would install them on an empty machine."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--no-build-isolation", "--use-pep517", "--report", str(report)]
        # Local folders of wheels may hold a CPU build under the same version.
        away = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
        subprocess.run(
            [*command, "-r", str(requirements)],
            cwd=FOLDER.parent,
            env=os.environ | away,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        installs = json.loads(report.read_text())["install"]
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in installs}
    sources = [
        i["metadata"]["name"] for i in installs if not i["download_info"]["url"].endswith("whl")
    ]
    print(
        f"{requirements.name}: {len(found)} packages, from source: {', '.join(sources) or 'none'}"
    )
    found.pop("rlzoo", None)
    return found


def main(argv: list[str]) -> None:
    if "--check" not in argv:
        lines = [f"{name}=={version}" for name, version in resolved(FOLDER / "cuda.in").items()]
        canonical = lambda line: re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()  # noqa: E731
        LOCK.write_text(HEAD + "\n".join(sorted(lines, key=canonical)) + "\n")
    pins = [line.strip().split("==") for line in LOCK.read_text().splitlines() if "==" in line]
    again = resolved(LOCK)
    if again != dict(pins):
        wrong = set(again.items()) ^ set(map(tuple, pins))
        sys.exit(
            f"{LOCK} does not resolve to itself: {sorted(wrong)}. Make it anew: make lock-cuda."
        )
    print(f"{LOCK.name} is complete: {len(again)} packages resolve to themselves.")


if __name__ == "__main__":
    main(sys.argv[1:])
