"""Compares the metrics.csv of equally named runs in two folders: compare.py OLD NEW

Prints a row per run: rows compared, cells that differ, columns that one of them lacks. Times are
left aside; a cell that was empty in OLD is a figure that was not logged then.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def compare(old: Path, new: Path) -> tuple[int, int, list[str], list[str]]:
    """Rows, differing cells, and the columns that only one of two runs has."""
    before, after = rows_of(old), rows_of(new)
    columns = [{c for c in rows[0] if not c.startswith("time/")} for rows in (before, after)]
    cells = sum(
        a[column] != b[column]
        for a, b in zip(before, after, strict=True)
        for column in columns[0] & columns[1]
        if a[column]
    )
    return len(before), cells, sorted(columns[0] - columns[1]), sorted(columns[1] - columns[0])


def main() -> None:
    old, new = (Path(argument) for argument in sys.argv[1:])
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["run", "rows", "cells_that_differ", "columns_lost", "columns_new"])
    both = [
        p for p in new.iterdir() if all((d / p.name / "summary.json").exists() for d in (old, new))
    ]
    for run_dir in sorted(both):
        rows, cells, lost, added = compare(old / run_dir.name, run_dir)
        writer.writerow([run_dir.name, rows, cells, " ".join(lost), " ".join(added)])


if __name__ == "__main__":
    main()
