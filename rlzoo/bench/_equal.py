"""Whether two runs wrote the same figures."""

from __future__ import annotations

from pathlib import Path

from rlzoo.report.loggers import read_csv


def equal_but_time(path_a: str | Path, path_b: str | Path) -> list[str]:
    """Lists where two CSV files differ, columns that start with `time/` aside.

    Returns:
        One sentence per differing cell, missing column or missing row; empty for equal files.
        Rows are counted from 1, the header apart.
    """
    header_a, rows_a = read_csv(Path(path_a))
    header_b, rows_b = read_csv(Path(path_b))
    differences = [
        f"column {name}: only in {path}"
        for path, names, others in ((path_a, header_a, header_b), (path_b, header_b, header_a))
        for name in names
        if name not in others and not name.startswith("time/")
    ]
    shared = [name for name in header_a if name in header_b and not name.startswith("time/")]
    for i, (row_a, row_b) in enumerate(zip(rows_a, rows_b, strict=False), start=1):
        for name in shared:
            a, b = row_a[header_a.index(name)], row_b[header_b.index(name)]
            if a != b:
                differences.append(f"row {i}, column {name}: {a or 'empty'} != {b or 'empty'}")
    if len(rows_a) != len(rows_b):
        differences.append(f"rows: {len(rows_a)} != {len(rows_b)}")
    return differences
