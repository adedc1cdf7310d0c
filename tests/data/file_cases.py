"""Files as people have them, each with what `data=file` makes of it; docs/data.md holds the table.

`python -m tests.data.file_cases` prints the table anew.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from rlzoo.data.prompts import FilePrompts
from rlzoo.errors import UserError

ROWS = [
    {"question": "What is 1 + 1?", "answer": 2},
    {"question": "Où est-ce, ou «là»?", "answer": "1,234"},
]
READ = [("What is 1 + 1?", "2"), ("Où est-ce, ou «là»?", "1,234")]  # what a file of ROWS gives
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "2"}]
CHAT_READ = [("system: Be brief.\n\nuser: What is 1 + 1?", "2")]
AS_TEXT = json.dumps({"m": json.dumps(CHAT), "answer": 2})
CSV = 'question,answer\nWhat is 1 + 1?,2\n"Où est-ce, ou «là»?","1,234"\n'


@dataclass
class Case:
    """One file, or several.

    Attributes:
        what: its line in the table.
        files: name -> bytes or text.
        options: settings of the source beside `file_format=auto`.
        prompts: (question, answer) of each prompt that is read; None where it is refused.
    """

    what: str
    files: dict[str, bytes | str]
    options: dict[str, Any] = field(default_factory=dict)
    prompts: list[tuple[str, str]] | None = field(default_factory=lambda: READ)
    path: str | None = None  # what data.path names; the first file, if None


def parquet(table: pyarrow.Table | list[dict]) -> bytes:
    table = pyarrow.Table.from_pylist(table) if isinstance(table, list) else table
    pyarrow.parquet.write_table(table, file := io.BytesIO())
    return file.getvalue()


def zst(text: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(text.encode())
    return sink.getvalue().to_pybytes()


def stream() -> bytes:
    table = pyarrow.Table.from_pylist([{"question": "q", "answer": "1"}])
    with pyarrow.ipc.new_stream(file := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


TEXT = [{**row, "answer": str(row["answer"])} for row in ROWS]
ONE = READ[:1]
NESTED = {
    "prompt": CHAT,
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"answers": ["2", "two"]},
}
NARROW = pyarrow.table({"question": ["q"], "answer": pyarrow.array([0.1], pyarrow.float32())})
DATES = NARROW.set_column(1, "answer", pyarrow.array([0], pyarrow.date32()))
TWICE = pyarrow.Table.from_arrays(
    [pyarrow.array(["q"])] * 3, names=["question", "answer", "answer"]
)
SHARDS = {
    "t-00000-of-00002.jsonl": json.dumps(ROWS[0]),
    "t-00001-of-00002.jsonl.gz": gzip.compress(json.dumps(ROWS[1]).encode()),
    "README.md": "#",
}
VERL = {"question_column": "prompt", "answer_column": "reward_model.ground_truth"}
LISTED = {"answer_column": "extra_info.answers", "answer_format": "first"}

GIVEN = [
    Case("JSON lines", {"a.jsonl": LINES}),
    Case("with a byte order mark", {"a.jsonl": LINES.encode("utf-8-sig")}),
    Case("with Windows line ends and empty lines", {"a.jsonl": LINES.replace("\n", "\r\n\r\n")}),
    Case("UTF-16, with or without a byte order mark", {"a.jsonl": LINES.encode("utf-16")}),
    Case("UTF-16, big-endian, without", {"a.jsonl": LINES.encode("utf-16-be")}),
    Case("Latin-1", {"a.jsonl": LINES.encode("latin-1")}, prompts=None),
    Case("numbers and text mixed in a column", {"a.jsonl": LINES}),
    Case(
        "a key twice in a row",
        {"a.jsonl": '{"question": "q", "answer": 1, "answer": 2}'},
        prompts=None,
    ),
    Case("two objects on a line", {"a.jsonl": LINES.replace("\n", " ")}, prompts=None),
    Case("a Python dict on a line", {"a.jsonl": str(ROWS[0])}, prompts=None),
    Case("a null answer", {"a.jsonl": LINES + '{"question": "q", "answer": null}'}, prompts=None),
    Case("the question of another row again", {"a.jsonl": LINES + LINES}, prompts=None),
    Case(
        "a line of 3 MB",
        {"a.jsonl": json.dumps({**ROWS[0], "more": "x" * 3_000_000})},
        prompts=ONE,
    ),
    Case("gz", {"a.jsonl.gz": gzip.compress(LINES.encode())}),
    Case("gz under another name", {"a.jsonl": gzip.compress(LINES.encode())}),
    Case("bz2", {"a.jsonl.bz2": bz2.compress(LINES.encode())}),
    Case("xz", {"a.jsonl.xz": lzma.compress(LINES.encode())}),
    Case("zst", {"a.jsonl.zst": zst(LINES)}),
    Case("gz, cut short", {"a.jsonl.gz": gzip.compress(LINES.encode())[:-12]}, prompts=None),
    Case("JSON array", {"a.json": json.dumps(ROWS, indent=2)}),
    Case("JSON array under another name", {"a.jsonl": json.dumps(ROWS)}),
    Case("JSON array, cut short", {"a.json": json.dumps(ROWS)[:-9]}, prompts=None),
    Case(
        "one JSON object over several lines",
        {"a.json": json.dumps({"data": ROWS}, indent=2)},
        prompts=None,
    ),
    Case("rows inside an object", {"a.json": json.dumps({"data": ROWS})}, prompts=None),
    Case("parquet", {"a.parquet": parquet(TEXT)}),
    Case("parquet under another name", {"a.jsonl": parquet(TEXT)}),
    Case(
        "parquet where JSON is asked for",
        {"a.jsonl": parquet(TEXT)},
        {"file_format": "jsonl"},
        None,
    ),
    Case("JSON where parquet is asked for", {"a.parquet": LINES}, {"file_format": "parquet"}, None),
    Case(
        "parquet, nested columns and a chat",
        {"a.parquet": parquet([NESTED])},
        VERL,
        CHAT_READ,
    ),
    Case(
        "a turn of a chat by its place",
        {"a.parquet": parquet([NESTED])},
        VERL | {"question_column": "prompt.-1.content"},
        ONE,
    ),
    Case(
        "lists of answers",
        {"a.parquet": parquet([NESTED | {"question": READ[0][0]}])},
        LISTED,
        ONE,
    ),
    Case(
        "a list where one answer is asked for",
        {"a.parquet": parquet([NESTED | {"question": "q"}])},
        LISTED | {"answer_format": "plain"},
        None,
    ),
    Case(
        "an object where an answer is asked for",
        {"a.parquet": parquet([NESTED])},
        VERL | {"answer_column": "reward_model"},
        None,
    ),
    Case(
        "a nested column that is not there",
        {"a.parquet": parquet([NESTED])},
        VERL | {"answer_column": "reward_model.truth"},
        None,
    ),
    Case(
        "a chat that ends with its answer",
        {"a.jsonl": json.dumps({"m": ANSWERED, "answer": 2})},
        {"question_column": "m"},
        None,
    ),
    Case(
        "the same by the places of its turns",
        {"a.jsonl": json.dumps({"m": ANSWERED})},
        {"question_column": "m.1.content", "answer_column": "m.2.content"},
        ONE,
    ),
    Case("a chat as JSON text", {"a.jsonl": AS_TEXT}, {"question_column": "m"}, CHAT_READ),
    Case(
        "a chat as Python text",
        {"a.jsonl": json.dumps({"m": str(CHAT), "answer": 2})},
        {"question_column": "m"},
        None,
    ),
    Case(
        "turns of from and value",
        {"a.jsonl": json.dumps({"m": [{"from": "human", "value": "q"}], "answer": 2})},
        {"question_column": "m"},
        None,
    ),
    Case("float32 numbers", {"a.parquet": parquet(NARROW)}, {}, [("q", "0.1")]),
    Case(
        "dates as answers",
        {"a.parquet": parquet(DATES)},
        prompts=None,
    ),
    Case(
        "a null in a column",
        {"a.parquet": parquet([*TEXT, {"question": "q", "answer": None}])},
        prompts=None,
    ),
    Case("a column name twice", {"a.parquet": parquet(TWICE)}, prompts=None),
    Case("parquet without rows", {"a.parquet": parquet(NARROW.slice(1))}, prompts=None),
    Case("parquet, cut short", {"a.parquet": parquet(TEXT)[:-9]}, prompts=None),
    Case("parquet in gz", {"a.parquet.gz": gzip.compress(parquet(TEXT))}, prompts=None),
    Case("CSV, with quotes and commas in cells", {"a.csv": CSV}),
    Case(
        "CSV with newlines in cells",
        {"a.csv": 'question,answer\n"What is\n1 + 1?",2\n'},
        prompts=[("What is\n1 + 1?", "2")],
    ),
    Case(
        "CSV with a byte order mark, Windows line ends",
        {"a.csv": CSV.replace("\n", "\r\n").encode("utf-8-sig")},
    ),
    Case("CSV in UTF-16", {"a.csv": CSV.encode("utf-16")}),
    Case("CSV in Latin-1", {"a.csv": CSV.encode("latin-1")}, prompts=None),
    Case("CSV with semicolons", {"a.csv": "question;answer\nWhat is 1 + 1?;2\n"}, prompts=ONE),
    Case(
        "TSV, in gz",
        {"a.tsv.gz": gzip.compress(b"question\tanswer\nWhat is 1 + 1?\t2\n")},
        prompts=ONE,
    ),
    Case("a cell too many", {"a.csv": "question,answer\nWhat is 1 + 1?,2,3\n"}, prompts=None),
    Case("an empty cell", {"a.csv": "question,answer\nWhat is 1 + 1?,\n"}, prompts=None),
    Case(
        "a quote that is never closed",
        {"a.csv": 'question,answer\n"What is 1 + 1?,2\nq,3\n'},
        prompts=None,
    ),
    Case("CSV, a column name twice", {"a.csv": "question,answer,answer\nq,1,2\n"}, prompts=None),
    Case("CSV where JSON is asked for", {"a.csv": CSV}, {"file_format": "jsonl"}, None),
    Case(
        "shards in a folder, packed or not",
        SHARDS,
        path=".",
    ),
    Case(
        "files by a pattern",
        {"a1.jsonl": json.dumps(ROWS[0]), "a2.json": json.dumps(ROWS[1:]), "b.jsonl": LINES},
        path="a*.json*",
    ),
    Case("a shard is missing", {"t-00000-of-00002.parquet": parquet(TEXT)}, prompts=None, path="."),
    Case(
        "train and test in one folder",
        {"train.jsonl": LINES, "test.jsonl": LINES},
        prompts=None,
        path=".",
    ),
    Case("two formats in one folder", {"a.jsonl": LINES, "b.csv": CSV}, prompts=None, path="."),
    Case("a folder without such files", {"README.md": "#"}, prompts=None, path="."),
    Case("a pattern that fits nothing", {"a.jsonl": LINES}, prompts=None, path="b*.jsonl"),
    Case("no file of that name", {"train.jsonl": LINES}, prompts=None, path="trian.jsonl"),
    Case("an empty file", {"a.jsonl": ""}, prompts=None),
    Case("nothing but empty lines", {"a.jsonl": "\n \n"}, prompts=None),
    Case(
        "a Git LFS pointer",
        {"a.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:0"},
        prompts=None,
    ),
    Case("a web page", {"a.jsonl": "\n<!DOCTYPE html>\n<html>"}, prompts=None),
    Case("a zip archive or an Excel sheet", {"a.xlsx": b"PK\x03\x04"}, prompts=None),
    Case("what save_to_disk writes", {"data-00000-of-00001.arrow": stream()}, prompts=None),
]


def outcome(case: Case, folder: Path) -> tuple[list[tuple[str, str]] | None, str]:
    """(prompts, "read"), or (None, the message), with FILE and FOLDER for the paths in it."""
    for name, data in case.files.items():
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    path = case.path or next(iter(case.files))
    path = str(folder) if path == "." else str(folder / path)
    options = {"question_column": "question", "answer_column": "answer", "file_format": "auto"}
    try:
        source = FilePrompts(path, val_fraction=0.0, **(options | case.options))
        return [(prompt.question, prompt.answer) for prompt in source.load("train")], "read"
    except UserError as error:
        message = str(error)
        if case.path is None:
            message = message.replace(path, "FILE")
        return None, message.replace(str(folder), "FOLDER")


def table(outcomes: list[str]) -> str:
    """The table of docs/data.md."""
    lines = ["| file | what comes of it |", "|---|---|"]
    for case, told in zip(GIVEN, outcomes, strict=True):
        told = re.sub(r" \((?:[^()]|\([^()]*\))*\)", "", told)  # what libraries say, and keys
        cell = "read" if told == "read" else f"refused: {told}"
        cell = re.sub(r"\s+", " ", cell).replace("|", "\\|")
        lines.append(f"| {case.what} | {cell} |")
    return "\n".join(lines)


def outcomes(make_folder: Callable[[], Path]) -> list[tuple[list[tuple[str, str]] | None, str]]:
    return [outcome(case, make_folder()) for case in GIVEN]


if __name__ == "__main__":
    print(table([told for _, told in outcomes(lambda: Path(tempfile.mkdtemp()))]))
