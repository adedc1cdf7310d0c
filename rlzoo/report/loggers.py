"""A run's own loggers; the CSV one writes equal files for equal runs and is cut back by a resume.

Lightning's own CSVLogger forgets rows when a column appears late and cannot be truncated.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from rlzoo.errors import UserError
from rlzoo.values import PathText, Text

log = logging.getLogger(__name__)


class RunLogger(Logger):
    """What is logged of one run, in its directory; `config.yaml` there says what was asked for.

    Args:
        run_dir: directory of the run; made if need be.
    """

    def __init__(self, run_dir: PathText | Path) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.run_dir)

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the configuration is kept elsewhere."""


class CSVLogger(RunLogger):
    """Writes one row per `log_metrics` call to `run_dir/filename`.

    Columns stand in order of first appearance; a new one rewrites the file with a longer header.
    Floats are written by repr, the shortest text that reads back to the same float64, so equal
    runs give byte-equal files. A cell without a value is empty. Nothing is touched before the
    first row or `load_state_dict`: without the latter an existing file is replaced. Only rank 0
    writes. `step` is not written: whoever logs puts what counts (`rollout_step`) in the row.

    The rows are kept in memory and in checkpoints (about 1.5 kB a row): a file that someone has
    edited, saved from a spreadsheet, moved or removed is written anew, and theirs kept beside it.

    Args:
        run_dir: see `RunLogger`.
        filename: name of the file in it.
    """

    def __init__(self, run_dir: PathText | Path, filename: Text = "metrics.csv") -> None:
        super().__init__(run_dir)
        self.path = self.run_dir / filename
        self._columns: list[str] = []
        self._rows: list[list[str]] = []  # cells as text; later columns may be missing
        self._file: TextIO | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Appends one row; numbers may be Python's, numpy's or zero-dimensional tensors."""
        if not metrics:
            return
        new = [name for name in metrics if name not in self._columns]
        if new:
            self._columns = self._columns + new
            self._replace_file()
        if self._file is None:
            # Line buffered: a reader beside the run sees whole rows as they come.
            self._file = self.path.open("a", buffering=1, encoding="utf-8", newline="")
        self._rows.append([_cell(metrics.get(name)) for name in self._columns])
        _write(self._file, self._rows[-1:])

    @rank_zero_only
    def flush(self) -> None:
        """Returns when every row so far is on the disk."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        if not self._still_there(self._file):
            self._replace_file()

    def save(self) -> None:
        self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flushes and closes; a later row opens the file again."""
        self.flush()
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; call `flush` before it is written."""
        return {
            "rows": len(self._rows),
            "columns": list(self._columns),
            "cells": [list(row) for row in self._rows],
        }

    @rank_zero_only
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the file back to the rows and columns it had at `state_dict`.

        Raises:
            UserError: of an older state, which has no cells: the file is gone, has fewer rows, or
                other columns than the state says.
        """
        self._close()
        rows, self._columns = state["rows"], list(state["columns"])
        found = read_csv(self.path) if self.path.exists() else ([], [])
        if "cells" in state:
            self._rows = [list(row) for row in state["cells"]]
        else:
            self._rows = self._cut(found, rows)
        if self._columns and self.path.exists() and not self._begins_as_ours(*found):
            self._put_aside()
        if self._columns:
            self._replace_file()
        else:
            self.path.unlink(missing_ok=True)

    def _cut(self, found: tuple[list[str], list[list[str]]], rows: int) -> list[list[str]]:
        """The first rows and columns of a file, as many as there were."""
        (header, kept), columns = found, self._columns
        if len(kept) < rows or header[: len(columns)] != columns:
            raise UserError(
                f"{self.path} holds {len(kept)} rows of {len(header)} columns, but the checkpoint"
                f" was saved after {rows} rows of {len(columns)}: it was edited or belongs to"
                " another run. Put the run's own file back, or start afresh in another run_dir."
            )
        return [row[: len(columns)] for row in kept[:rows]]

    def _begins_as_ours(self, header: list[str], rows: list[list[str]]) -> bool:
        """Whether a file is the run's own, up to what was written after the state."""
        ours, width = self._whole_rows(), len(self._columns)
        return header[:width] == self._columns and [r[:width] for r in rows[: len(ours)]] == ours

    def _whole_rows(self) -> list[list[str]]:
        return [row + [""] * (len(self._columns) - len(row)) for row in self._rows]

    def _put_aside(self) -> None:
        """Keeps a file that someone has changed, under a name that nothing has."""
        names = (f"{self.path.stem}.edited-{i}{self.path.suffix}" for i in itertools.count(1))
        aside = next(path for name in names if not (path := self.path.with_name(name)).exists())
        os.replace(self.path, aside)
        log.warning("%s was changed by someone: it is now %s.", self.path, aside.name)

    def _still_there(self, file: TextIO) -> bool:
        """Whether the open file is the one of that name: a spreadsheet saves another over it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _replace_file(self) -> None:
        """Writes the file anew beside itself and renames it, so that a crash leaves either one."""
        if self._file is not None and not self._still_there(self._file) and self.path.exists():
            self._put_aside()
        self._close()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            _write(file, [self._columns, *self._whole_rows()])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; a last line that a killed writer left unfinished is no row."""
    text = path.read_text(encoding="utf-8", errors="replace")  # a person's may be anything
    try:
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    except csv.Error:
        return [], []
    return (lines[0], lines[1:]) if lines else ([], [])


def _write(file: TextIO, rows: Iterable[list[str]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(rows)


def _cell(value: Any) -> str:
    """Text of one value: repr of a float, digits of an int or bool, nothing for None."""
    if hasattr(value, "item"):  # a tensor or numpy scalar, whose repr names its type
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return str(int(value)) if isinstance(value, bool) else str(value)
