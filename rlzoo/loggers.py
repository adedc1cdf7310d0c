"""A CSV logger whose files are equal for equal runs and can be cut back for a resume.

Lightning's own CSVLogger forgets rows when a column appears late and cannot be truncated.
"""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlzoo.errors import UserError
from rlzoo.values import PathText, Text


class CSVLogger(Logger):
    """Writes one row per `log_metrics` call to `run_dir/filename`.

    Columns stand in order of first appearance; a new one rewrites the file with a longer header.
    Floats are written by repr, the shortest text that reads back to the same float64, so equal
    runs give byte-equal files. A cell without a value is empty. Nothing is touched before the
    first row or `load_state_dict`: without the latter an existing file is replaced. Only rank 0
    writes. `step` is not written: whoever logs puts what counts (`rollout_step`) in the row.

    Args:
        run_dir: directory of the run; made if need be.
        filename: name of the file in it.
    """

    def __init__(self, run_dir: PathText | Path, filename: Text = "metrics.csv") -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / filename
        self._columns: list[str] = []
        self._rows = 0
        self._file: TextIO | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.run_dir)

    @property
    def root_dir(self) -> str:
        return str(self.run_dir)

    @property
    def log_dir(self) -> str:
        return str(self.run_dir)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the run directory's `config.yaml` says what the run was asked for."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Appends one row; numbers may be Python's, numpy's or zero-dimensional tensors."""
        if not metrics:
            return
        new = [name for name in metrics if name not in self._columns]
        if new:
            old_rows = self._read_rows() if self._columns else []
            self._replace_file(self._columns + new, old_rows)
        if self._file is None:
            # Line buffered: a reader beside the run sees whole rows as they come.
            self._file = self.path.open("a", buffering=1, encoding="utf-8", newline="")
        self._file.write(_csv_line(_cell(metrics.get(name)) for name in self._columns))
        self._rows += 1

    @rank_zero_only
    def flush(self) -> None:
        """Returns when every row so far is on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def save(self) -> None:
        self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flushes and closes; a later row opens the file again."""
        self.flush()
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; call `flush` before it is written."""
        return {"rows": self._rows, "columns": list(self._columns)}

    @rank_zero_only
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cuts the file back to the rows and columns it had at `state_dict`.

        Raises:
            UserError: the file is gone, has fewer rows, or other columns than the state says.
        """
        self._close()
        rows, columns = state["rows"], list(state["columns"])
        self._rows = rows
        if not columns:
            self._columns = []
            self.path.unlink(missing_ok=True)
            return
        header, kept = _read_csv(self.path) if self.path.exists() else ([], [])
        if len(kept) < rows or header[: len(columns)] != columns:
            raise UserError(
                f"{self.path} holds {len(kept)} rows of {len(header)} columns, but the checkpoint"
                f" was saved after {rows} rows of {len(columns)}: it was edited or belongs to"
                " another run. Put the run's own file back, or start afresh in another run_dir."
            )
        self._replace_file(columns, [row[: len(columns)] for row in kept[:rows]])

    def _read_rows(self) -> list[list[str]]:
        self._close()
        return _read_csv(self.path)[1]

    def _replace_file(self, columns: list[str], rows: list[list[str]]) -> None:
        """Writes the file anew beside itself and renames it, so that a crash leaves either one."""
        self._close()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(_csv_line(columns))
            for row in rows:
                file.write(_csv_line(row + [""] * (len(columns) - len(row))))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._columns = columns

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def equal_but_time(path_a: str | Path, path_b: str | Path) -> list[str]:
    """Lists where two CSV files differ, columns that start with `time/` aside.

    Returns:
        One sentence per differing cell, missing column or missing row; empty for equal files.
        Rows are counted from 1, the header apart.
    """
    header_a, rows_a = _read_csv(Path(path_a))
    header_b, rows_b = _read_csv(Path(path_b))
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


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; a last line that a killed writer left unfinished is no row."""
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    return (lines[0], lines[1:]) if lines else ([], [])


def _csv_line(cells: Iterable[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _cell(value: Any) -> str:
    """Text of one value: repr of a float, digits of an int or bool, nothing for None."""
    if hasattr(value, "item"):  # a tensor or numpy scalar, whose repr names its type
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return str(int(value)) if isinstance(value, bool) else str(value)
