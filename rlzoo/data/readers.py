"""Rows of data files, one at a time: JSON lines or an array, parquet, CSV; numbers as written."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from rlzoo.data.answers import BadRow
from rlzoo.data.files import BROKEN, Content, content, cut_short
from rlzoo.errors import UserError

Row = tuple[int, dict[str, Any] | BadRow]  # number from 1

_SPACE = re.compile(r"[ \t\r\n]+")
ICONV = "iconv -f latin1 -t utf-8"


class Repeats(dict[str, Any]):
    """A JSON object in which a key stands more than once."""

    repeated: frozenset[str] = frozenset()


def read_rows(path: Path, columns: Sequence[str], file_format: str = "auto") -> Iterator[Row]:
    """(line or row number from 1, row) of every row that is not blank.

    Args:
        columns: names that are asked for, those of nested fields with dots (`extra.answer`,
            `messages.0.content`); a parquet file gives no others.

    Raises:
        UserError: a file that is not of a format we read, or broken, or changed meanwhile.
    """
    found = content(path, file_format)
    before = path.stat()
    try:
        if found.kind == "parquet":
            yield from read_parquet(path, columns)
        else:
            with found.open() as file:
                if found.kind == "csv":
                    yield from read_csv(file, found, path, columns)
                elif found.is_array:
                    yield from read_array(file, found, path)
                else:
                    yield from read_lines(file, found)
    except BROKEN as error:
        raise cut_short(path, error) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {found.encoding} text throughout ({error}); convert the file, such as"
            f" by {ICONV}."
        ) from error
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path} was changed while it was read; start again when it is complete.")


def value_at(row: Any, name: str) -> Any:
    """What a row has under a name; dots lead into objects and lists. None also below a null.

    Raises:
        KeyError: nothing.
    """
    if name in row:
        return row[name]
    value = row
    for part in name.split("."):
        if value is None:
            return None
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, TypeError, ValueError):
            raise KeyError(name) from None
    return value


# --- JSON ---------------------------------------------------------------------------------------


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    repeats, names = Repeats(row), [name for name, _ in pairs]
    repeats.repeated = frozenset(name for name in row if names.count(name) > 1)
    return repeats


# A number keeps the digits it is written with.
DECODER = json.JSONDecoder(
    parse_float=Decimal, parse_int=Decimal, parse_constant=Decimal, object_pairs_hook=json_object
)


def read_lines(file: BinaryIO, found: Content) -> Iterator[Row]:
    """JSON lines, one of them in memory at a time."""
    is_utf8 = found.encoding in ("utf-8", "utf-8-sig")
    lines: Iterable[bytes | str] = file
    if not is_utf8:
        lines = io.TextIOWrapper(file, found.encoding, newline="\n")
    for number, raw in enumerate(lines, start=1):
        try:
            encoding = found.encoding if number == 1 else "utf-8"
            line = raw.decode(encoding) if isinstance(raw, bytes) else raw
            if line.isspace() or not line:
                continue
            row = DECODER.decode(line)
        except UnicodeDecodeError as error:
            yield number, BadRow(f"is not UTF-8 ({error}); convert the file, such as by {ICONV}")
            continue
        except (ValueError, RecursionError) as error:  # not JSON, or too deep
            yield number, BadRow(f"is not JSON ({error}){json_hint(line, number, error)}")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            kind = "number" if isinstance(row, Decimal) else type(row).__name__
            yield number, BadRow(f"is a JSON {kind}, not an object")


def json_hint(line: str, number: int, error: Exception) -> str:
    """What a line that is no JSON may be instead."""
    line = line.strip()
    if "Extra data" in str(error):
        return ": end each object with a newline"
    if line.startswith("{'"):
        return ": a Python dict, not JSON; write it with json.dumps"
    if number == 1 and not line.startswith("{"):
        return ": set data.file_format=csv if the file is CSV"
    if number == 1 and len(line) < 2:
        return ": write one object a line, or one array of objects"
    return ""


def read_array(file: BinaryIO, found: Content, path: Path) -> Iterator[Row]:
    """One JSON array; its text is in memory as a whole, its elements one at a time."""
    text = file.read().decode(found.encoding)
    position, number = after_space(text, text.index("[") + 1), 0
    try:
        while text[position : position + 1] != "]":
            if number and text[position : position + 1] != ",":
                raise ValueError(f"no comma at character {position}")
            if number:
                position = after_space(text, position + 1)
            row, position = DECODER.raw_decode(text, position)
            number += 1
            is_object = isinstance(row, dict)
            yield number, row if is_object else BadRow(f"is a {type(row).__name__}, not an object")
            position = after_space(text, position)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is a JSON array that breaks off or is broken at row {number + 1} ({error});"
            " write or download it anew."
        ) from error
    if text[position + 1 :].strip():
        raise UserError(f"{path} goes on after the end of its JSON array: write one object a line.")


def after_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return space.end() if space else position


# --- CSV ----------------------------------------------------------------------------------------


def read_csv(file: BinaryIO, found: Content, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Comma, tab or semicolon separated, whichever gives the columns asked for; first line names.

    An empty cell is null. Quoted cells may hold newlines.
    """
    csv.field_size_limit(sys.maxsize)
    encoding = "utf-8-sig" if found.encoding == "utf-8" else found.encoding
    text = io.TextIOWrapper(file, encoding, newline="")
    first = text.readline()
    marks = [m for m in ",\t;" if set(columns) <= set(next(csv.reader([first], delimiter=m), []))]
    mark = marks[0] if marks else max(",\t;", key=first.count)
    reader = csv.reader(itertools.chain([first], text), delimiter=mark, strict=True)
    names = next(reader, [])
    check_columns(path, columns, names, {name: None for name in names})
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):  # the quote took all the lines that follow
                raise UserError(
                    f"{path}, line {number}: a quote is opened that is never closed ({error})."
                    " Close it; a quote inside a cell is written twice."
                ) from error
            yield number, BadRow(f"is not CSV ({error}); a quote inside a cell is written twice")
            continue
        if not cells:
            continue
        if len(cells) != len(names):
            yield number, BadRow(f"has {len(cells)} cells, but the first line names {len(names)}")
            continue
        yield number, dict(zip(names, (cell or None for cell in cells), strict=True))


# --- parquet ------------------------------------------------------------------------------------


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            types = dict(zip(schema.names, schema.types, strict=True))
            check_columns(path, columns, schema.names, types)
            roots = {name if name in schema.names else name.split(".")[0] for name in columns}
            exact = {n: convert for n in roots if (convert := exactly(schema.field(n).type))}
            number = 0
            for batch in file.iter_batches(columns=sorted(roots)):
                for row in batch.to_pylist():
                    number += 1
                    for name, convert in exact.items():
                        row[name] = convert(row[name])
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a readable parquet file ({error}). If it is cut short, write or"
            " download it anew."
        ) from error


def exactly(kind: pyarrow.DataType) -> Callable[[Any], Any] | None:
    """Gives narrow floats their width back, in which 0.1 is 0.1; None where there are none.

    pyarrow makes them Python's, and 0.1 of float32 a 0.10000000149011612.
    """
    narrow = {pyarrow.float32(): np.float32, pyarrow.float16(): np.float16}.get(kind)
    if narrow is not None:
        return lambda value: None if value is None else narrow(value)
    if pyarrow.types.is_struct(kind):
        inside = {field.name: give for field in kind if (give := exactly(field.type))}
        if inside:
            return lambda row: row and row | {n: give(row[n]) for n, give in inside.items()}
    elif hasattr(kind, "value_type") and not pyarrow.types.is_dictionary(kind):
        convert = exactly(kind.value_type)
        return convert and (lambda row: row and [convert(value) for value in row])
    return None


# --- columns ------------------------------------------------------------------------------------


def check_columns(
    path: Path, columns: Sequence[str], names: Sequence[str], types: dict[str, Any]
) -> None:
    """Raises a UserError for a column that a table has not, or has twice."""
    for name in columns:
        root = name if name in names else name.split(".")[0]
        if root not in names or (root != name and not leads(types[root], name.split(".")[1:])):
            raise no_such_column(path, name, [*names, *nested(names, types)])
        if list(names).count(root) > 1:
            raise UserError(f"{path} has {list(names).count(root)} columns {root!r}: rename one.")


def leads(kind: pyarrow.DataType | None, parts: Sequence[str]) -> bool:
    """Whether a path of names and places leads through a type."""
    if not parts:
        return True
    if kind is None:
        return False
    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index(parts[0])
        return index >= 0 and leads(kind.field(index).type, parts[1:])
    is_place = re.fullmatch(r"-?\d+", parts[0]) is not None
    return is_place and hasattr(kind, "value_type") and leads(kind.value_type, parts[1:])


def nested(names: Iterable[str], types: dict[str, Any]) -> list[str]:
    """Names of the fields of the struct columns of a table."""
    structs = [name for name in names if types[name] and pyarrow.types.is_struct(types[name])]
    return [f"{name}.{field.name}" for name in structs for field in types[name]]


def columns_and_match(name: str, found: Iterable[str]) -> str:
    """What columns there are, of a row or by name, and the one that may have been meant."""
    cells = found if isinstance(found, dict) else {}
    lists = {name: cell for name, cell in cells.items() if isinstance(cell, list) and cell}
    inside = [name for name, cell in lists.items() if isinstance(cell[0], dict)]
    found = sorted(found)
    match = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    if inside and not match:
        hint = f"; rows stand inside {inside[0]!r}: write them one a line"
    return f"columns found: {found}{hint}"


def no_such_column(path: Path, name: str, found: Iterable[str]) -> UserError:
    return UserError(
        f"{path} has no column {name!r}; {columns_and_match(name, found)} Set the column names"
        " under data (question_column, answer_column, solution_column, id_column)."
    )
