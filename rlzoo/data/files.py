"""Which files a path of `data` names, and what such a file is, by its first bytes."""

from __future__ import annotations

import bz2
import difflib
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow

from rlzoo.errors import UserError

FORMATS = {  # file_format -> endings of the files that a folder is searched for
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "csv": (".csv", ".tsv"),
}
COMPRESSED: dict[bytes, tuple[str, Callable[[Path], io.BufferedIOBase]]] = {
    b"\x1f\x8b": (".gz", gzip.open),
    b"BZh": (".bz2", bz2.open),
    b"\xfd7zXZ\0": (".xz", lzma.open),
    b"\x28\xb5\x2f\xfd": (".zst", lambda path: pyarrow.input_stream(path, compression="zstd")),
}
FOREIGN = {  # first bytes -> what that is, and the mend
    b"version https://git-lfs": "is a Git LFS pointer and not the file itself; run git lfs pull",
    b"PK\x03\x04": "is a zip archive or an Excel sheet; unpack it, or save the sheet as CSV",
    b"ARROW1": "is an Arrow file; write it as parquet",
    b"\xff\xff\xff\xff": "is an Arrow stream, as save_to_disk writes; write it with to_parquet",
    b"PARE": "is an encrypted parquet file; write it unencrypted",
    b"7z\xbc\xaf": "is a 7z archive; unpack it",
    b"Obj\x01": "is an Avro file; write it as parquet or JSON lines",
    b"ORC": "is an ORC file; write it as parquet",
    b"SQLite format 3": "is an SQLite database; write its table as CSV or JSON lines",
    b"\x89HDF": "is an HDF5 file; write it as parquet or JSON lines",
    b"\x93NUMPY": "is a numpy array; write it as parquet or JSON lines",
    b"\x80": "is a Python pickle, which may run code when it is read; write it as JSON lines",
    b"%PDF": "is a PDF",
}
BROKEN = (EOFError, OSError, lzma.LZMAError, zlib.error)  # what reading a cut file raises
SPLIT_NAMES = {
    **{"train": "train", "training": "train", "test": "test", "eval": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
}


class Content(NamedTuple):
    """What a file is."""

    kind: str  # "jsonl" (JSON lines or one array), "parquet" or "csv"
    is_array: bool  # whether the JSON is one array
    encoding: str  # of text
    open: Callable[[], BinaryIO]  # opens the bytes, unpacked


# --- which files --------------------------------------------------------------------------------


def data_files(path: str, key: str, file_format: str) -> list[Path]:
    """The file, or the files of a folder or of a pattern with * and ?, by name.

    Raises:
        UserError: there is none, one is empty, shards are missing, or a folder holds several
            splits or formats, which would be read as one.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = folder_files(place, f"data.{key}={path}", file_format)
    elif glob.has_magic(path) and not place.exists():
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"data.{key}={path}: no file is so named. Check data.{key}.")
    else:
        files = [place]
    for file in files:
        check_file(file, f"data.{key}={path}", key)
    if len(files) > 1 or files[0] != place:
        check_shards(files, f"data.{key}={path}")
    return files


def folder_files(folder: Path, setting: str, file_format: str) -> list[Path]:
    wanted = list(FORMATS) if file_format == "auto" else [file_format]
    found: dict[str, list[Path]] = {}  # format -> files
    for file in sorted(folder.iterdir()):
        name = file.name
        for ending, _ in COMPRESSED.values():
            name = name.removesuffix(ending)
        kinds = [kind for kind in wanted if name.lower().endswith(FORMATS[kind])]
        if kinds and file.is_file() and not name.startswith((".", "_")):
            found.setdefault(kinds[0], []).append(file)
    if not found:
        endings = ", ".join(ending for kind in wanted for ending in FORMATS[kind])
        raise UserError(
            f"{setting} is a directory without a file that ends in {endings}: name the file, or a"
            " folder that holds such files itself."
        )
    if len(found) > 1:
        raise UserError(
            f"{setting} is a directory with files of several formats ({', '.join(found)}): say"
            " which with data.file_format, or name the files with a pattern such as *.jsonl."
        )
    (files,) = found.values()
    splits = {split_name(file): file.name for file in files}
    splits.pop(None, None)
    if len(splits) > 1:
        raise UserError(
            f"{setting} is a directory with files of several splits ({', '.join(splits.values())}),"
            f" which would be read as one. Name those of each, such as {setting}/train*."
        )
    return files


def split_name(file: Path) -> str | None:
    """The split that a file's name begins with, if any."""
    return SPLIT_NAMES.get(re.split(r"[^a-z]", file.name.lower(), maxsplit=1)[0])


def check_shards(files: Iterable[Path], setting: str) -> None:
    """Raises a UserError unless all files NAME-00000-of-00003 of a set are there."""
    sets: dict[tuple[str, int], set[int]] = {}
    for file in files:
        match = re.match(r"(.*?)-(\d+)-of-(\d+)\b", file.name)
        if match:
            sets.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, total), there in sets.items():
        absent = sorted(set(range(total)) - there)
        if absent:
            raise UserError(
                f"{setting} holds {len(there)} of the {total} files of {name}: number {absent[0]}"
                " is missing. Complete the download, or name the files that are meant one by one"
                " in a folder of their own."
            )


def check_file(file: Path, setting: str, key: str) -> None:
    if not file.exists():
        there = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        match = difflib.get_close_matches(file.name, there, n=1)
        hint = f" Did you mean {file.parent / match[0]}?" if match else ""
        if "://" in setting or (not file.suffix and not file.parent.exists()):
            hint = " If it is the name of a data set on a hub, download its files and name those."
        raise UserError(f"{setting}: there is no such file.{hint} Check data.{key}.")
    if not file.is_file():
        raise UserError(f"{setting}: {file} is no ordinary file. Check data.{key}.")
    if file.stat().st_size == 0:
        name = "" if str(file.name) in setting else f": {file}"
        raise UserError(f"{setting} is an empty file{name}: give one with a prompt in each row.")


# --- what a file is -----------------------------------------------------------------------------


def content(path: Path, file_format: str = "auto") -> Content:
    """What a file is, told by its first bytes and not by its name.

    Args:
        file_format: what it should be; "auto" takes it for what it is.

    Raises:
        UserError: it is none of ours, or not what it should be.
    """
    reader: Callable[[], BinaryIO] = lambda: path.open("rb")  # noqa: E731
    try:
        with path.open("rb") as file:
            head = file.read(512)
        for magic, (_, unpack) in COMPRESSED.items():
            if head.startswith(magic):
                reader = lambda: io.BufferedReader(unpack(path))  # noqa: E731,B023
                with reader() as file:
                    head = file.read(512)
                if head.startswith(b"PAR1"):
                    raise UserError(f"{path} is a packed parquet file; unpack it first.")
                break
    except BROKEN as error:
        raise cut_short(path, error) from error
    foreign = [what for magic, what in FOREIGN.items() if head.startswith(magic)]
    if head[257:262] == b"ustar":
        foreign = ["is a tar archive; unpack it"]
    if foreign:
        raise UserError(f"{path} {foreign[0]}.")
    encoding = json.detect_encoding(head)
    start = head.decode(encoding, errors="ignore").lstrip().lower()
    if start.startswith(("<!doctype", "<html", "<?xml")):
        raise UserError(
            f"{path} is a web page or XML, perhaps the page of the file and not the file itself;"
            " download it anew."
        )
    kind = "csv"
    if head.startswith(b"PAR1"):
        kind = "parquet"
    elif start.startswith(("{", "[")) or not start:
        kind = "jsonl"
    if file_format not in ("auto", kind):
        kind = as_told(path, kind, file_format, is_blank=not start)
    return Content(kind, start.startswith("["), encoding, reader)


def as_told(path: Path, kind: str, file_format: str, is_blank: bool) -> str:
    """The format that a file of another look is read as: text may be any text."""
    if file_format != "parquet" and (is_blank or (file_format, kind) == ("jsonl", "csv")):
        return file_format  # each line says what is wrong with it
    names = {"jsonl": "JSON", "csv": "text", "parquet": "a parquet file"}
    told = {"parquet": "a readable parquet file", "csv": "CSV", "jsonl": "JSON"}[file_format]
    raise UserError(
        f"{path} is not {told} but {names[kind]}, and data.file_format={file_format}. Set"
        " data.file_format=auto to have it read as what it is."
    )


def cut_short(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} could not be read to its end ({error}). If it is cut short or broken, write or"
        " download it anew."
    )
