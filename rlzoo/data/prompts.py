"""Prompts from a file: JSON lines or parquet, with columns and answer formats of one's choosing."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from rlzoo.data.templates import PromptTemplate
from rlzoo.errors import UserError
from rlzoo.types import Prompt

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


class PromptSource(Protocol):
    """What `data=` chooses: where prompts come from, and how they are rendered."""

    template: PromptTemplate

    def load(self, split: str) -> list[Prompt]:
        """The prompts of "train", "val" or "test", not yet rendered."""


class BadRow(ValueError):
    """What is wrong with one row; the reader adds the file and the line."""


# --- answers ------------------------------------------------------------------------------------


def plain(value: Any) -> str:
    """The value as text; a whole float such as 27.0 as "27".

    Raises:
        BadRow: neither text nor a finite number, or nothing but spaces.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | numbers.Number):
        raise BadRow(f"is a {type(value).__name__}, not text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"is {value}")
    text = str(value).strip()
    if not text:
        raise BadRow("is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow("holds half a surrogate pair, which no tokenizer can read")
    return text


def boxed(value: Any) -> str:
    r"""What the last \boxed{...} of a text holds, inner braces included."""
    text = plain(value)
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    if not starts:
        raise BadRow(r"holds no \boxed{...}")
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[starts[-1] :], flags=re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # an escaped brace counts for nothing
        if depth == 0:
            return plain(text[starts[-1] : starts[-1] + brace.start()])
    raise BadRow(r"holds a \boxed{ that is never closed")


def hashes(value: Any) -> str:
    """What stands after the last `####`, without thousands separators: GSM8K's format."""
    before, mark, after = plain(value).rpartition("####")
    if not mark:
        raise BadRow("holds no ####")
    return plain(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", after))


def first(value: Any) -> str:
    """The first element of a list."""
    if not isinstance(value, list):
        raise BadRow(f"is a {type(value).__name__}, not a list")
    if not value:
        raise BadRow("is an empty list")
    return plain(value[0])


ANSWER_FORMATS: dict[str, Callable[[Any], str]] = {
    "plain": plain,
    "boxed": boxed,
    "hashes": hashes,
    "first": first,
}


# --- rows ---------------------------------------------------------------------------------------


def read_jsonl(path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict | BadRow]]:
    """(line number from 1, row) of each line that is not blank, one line in memory at a time."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep
                yield number, BadRow(f"is not JSON ({error})")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                yield number, BadRow(f"is a JSON {type(row).__name__}, not an object")


def read_parquet(path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict | BadRow]]:
    """(row number from 1, row) with the columns asked for, as far as the file has them."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = [name for name in file.schema_arrow.names if name in set(columns)]
            absent = [name for name in columns if name not in there]
            if absent:
                raise no_such_column(path, absent[0], file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=there):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from error


ROW_READERS = {"jsonl": read_jsonl, "parquet": read_parquet}


# --- the source ---------------------------------------------------------------------------------


class FilePrompts:
    """The prompt source behind `data=jsonl`, `data=parquet` and `data=gsm8k`.

    Args:
        path: file of the training prompts.
        question_column, answer_column: names in the file.
        val_path, test_path: files of the other splits. Where one is None, the split is taken from
            `path` by a hash of prompt id and seed, and leaves the training prompts.
        val_fraction, test_fraction: shares of `path` that are taken so, in [0, 1).
        solution_column: worked solutions, if any. When it is also the answer column and answers
            stand after `####`, the solution is the text before, without calculator notes
            (`<<48/2=24>>`), and the answer in a box.
        id_column: unique ids; None makes them from a hash of the question.
        file_format: `jsonl` or `parquet`.
        answer_format: a name from ANSWER_FORMATS.
        on_bad_row: `error` stops at a row without question or answer, an unreadable or a repeated
            one; `skip` leaves it out and counts it.
        max_prompts: most prompts of a split, a seeded choice in the order of the file; None: all.
        seed: of the splits and of that choice.
        template: how a question becomes tokens.

    Attributes:
        num_skipped: rows left out of the files read so far.

    Raises:
        UserError: a value out of range; in `load`, a file that cannot be used.
    """

    def __init__(
        self,
        path: str | None,
        question_column: str,
        answer_column: str,
        *,
        val_path: str | None = None,
        test_path: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.0,
        solution_column: str | None = None,
        id_column: str | None = None,
        file_format: str = "jsonl",
        answer_format: str = "plain",
        on_bad_row: str = "error",
        max_prompts: int | None = None,
        seed: int = 0,
        template: PromptTemplate | None = None,
    ) -> None:
        if path is None:
            raise UserError("data.path is not set: give the training file as data.path=FILE.")
        check_choice("file_format", file_format, ROW_READERS)
        check_choice("answer_format", answer_format, ANSWER_FORMATS)
        check_choice("on_bad_row", on_bad_row, ("error", "skip"))
        if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 - val_fraction):
            raise UserError(
                "data.val_fraction and data.test_fraction must be at least 0 and together below 1,"
                f" so that training prompts are left; got {val_fraction} and {test_fraction}."
            )
        if max_prompts is not None and max_prompts < 1:
            raise UserError(f"data.max_prompts must be null or at least 1, got {max_prompts}.")
        self.paths = {"train": path, "val": val_path, "test": test_path}
        self.question_column, self.answer_column = question_column, answer_column
        self.solution_column, self.id_column = solution_column, id_column
        self.file_format, self.answer_format = file_format, answer_format
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.on_bad_row, self.max_prompts, self.seed = on_bad_row, max_prompts, seed
        self.template = template or PromptTemplate()
        self.num_skipped = 0
        self._read: dict[str, list[Prompt]] = {}  # by path: a file is read and reported on once

    def load(self, split: str) -> list[Prompt]:
        """The prompts of `train`, `val` or `test`, in the order of their file.

        Raises:
            UserError: a missing, empty or unreadable file, a column it has not, a bad row under
                `on_bad_row=error`, or a split without prompts.
        """
        check_choice("split", split, SPLITS)
        path = self.paths[split]
        if path is not None and split != "train":
            prompts = self.read(path, f"{split}_path")
        else:
            prompts = self.read(self.paths["train"], "path")
            prompts = [prompt for prompt in prompts if self.split_of(prompt.id) == split]
        if not prompts:
            mend = f"Raise data.{split}_fraction or give data.{split}_path=FILE."
            if split == "train":
                mend = "Lower data.val_fraction or give more rows."
            raise UserError(f"The {split} split of {self.paths['train']} has no prompts. {mend}")
        if self.max_prompts is None or len(prompts) <= self.max_prompts:
            return list(prompts)
        chosen = sorted(prompts, key=lambda prompt: self.uniform("choice", prompt.id))
        keep = {prompt.id for prompt in chosen[: self.max_prompts]}
        return [prompt for prompt in prompts if prompt.id in keep]

    def split_of(self, prompt_id: str) -> str:
        """The split that a prompt of `path` is in; more test prompts never move a val prompt."""
        position = self.uniform("split", prompt_id)
        if self.paths["val"] is None and position < self.fractions["val"]:
            return "val"
        if self.paths["test"] is None and position >= 1 - self.fractions["test"]:
            return "test"
        return "train"

    def uniform(self, purpose: str, prompt_id: str) -> float:
        """A number in [0, 1) that depends on seed, purpose and prompt alone."""
        text = f"{self.seed}/{purpose}/{prompt_id}"
        digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48

    def read(self, path: str, key: str) -> list[Prompt]:
        """All good rows of a file as prompts; `key` is the setting it came from."""
        if path not in self._read:
            self._read[path] = self.read_file(check_file(path, key))
        return self._read[path]

    def read_file(self, path: Path) -> list[Prompt]:
        names = (self.question_column, self.answer_column, self.solution_column, self.id_column)
        columns = list(dict.fromkeys(name for name in names if name is not None))
        prompts: list[Prompt] = []
        lines: dict[str, int] = {}  # prompt id -> line
        found: dict[str, None] = {}  # columns, in the order they were met
        problems: list[str] = []
        for number, row in ROW_READERS[self.file_format](path, columns):
            try:
                if isinstance(row, BadRow):
                    raise row
                found |= dict.fromkeys(row)
                prompt = self.to_prompt(row)
                if prompt.id in lines:
                    raise BadRow(f"repeats prompt {prompt.id!r} of line {lines[prompt.id]}")
            except BadRow as problem:
                problems.append(f"{path}, line {number}: {problem}")
                if self.on_bad_row == "error":
                    raise UserError(
                        f"{problems[0]}. Mend the row, or leave such rows out with"
                        " data.on_bad_row=skip."
                    ) from None
                continue
            lines[prompt.id] = number
            prompts.append(prompt)
        for name in columns:
            if found and name not in found:
                raise no_such_column(path, name, found)
        if not prompts:
            detail = f" First problem: {problems[0]}." if problems else ""
            raise UserError(f"{path} holds no usable row.{detail}")
        if problems:
            self.num_skipped += len(problems)
            log.warning("%d rows of %s skipped; first: %s", len(problems), path, problems[0])
        return prompts

    def to_prompt(self, row: dict[str, Any]) -> Prompt:
        """Raises BadRow, naming the column, for a row that cannot be used."""
        question = self.field(row, "question_column", plain)
        answer = self.field(row, "answer_column", ANSWER_FORMATS[self.answer_format])
        if self.id_column is None:
            digest = hashlib.blake2b(question.encode(), digest_size=8).hexdigest()
            prompt_id = f"prompt-{digest}"
        else:
            prompt_id = self.field(row, "id_column", plain)
        return Prompt(id=prompt_id, question=question, answer=answer, solution=self.solution(row))

    def field(self, row: dict[str, Any], key: str, convert: Callable[[Any], str]) -> str:
        """The text in the column that setting `key` names."""
        name = getattr(self, key)
        if name not in row:
            raise BadRow(f"has no column {name!r} (data.{key}); {columns_and_match(name, row)}")
        if row[name] is None:
            raise BadRow(f"column {name!r} (data.{key}) is null")
        try:
            return convert(row[name])
        except BadRow as problem:
            raise BadRow(f"column {name!r} (data.{key}) {problem}") from None

    def solution(self, row: dict[str, Any]) -> str | None:
        """The worked solution; None where the row has none, which is no fault."""
        if self.solution_column is None or row.get(self.solution_column) is None:
            return None
        value = row[self.solution_column]
        if isinstance(value, list) and value:  # alternative solutions, the first as good as any
            value = value[0]
        if self.solution_column == self.answer_column and self.answer_format == "hashes":
            # GSM8K's calculator notes go; the answer is boxed, as prompts and rewards ask for it.
            text = re.sub(r"<<.*?>>", "", plain(value).rpartition("####")[0]).strip()
            value = f"{text}\n\\boxed{{{hashes(row[self.answer_column])}}}"
        return str(value).strip() or None


# --- checks -------------------------------------------------------------------------------------


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise UserError(f"data.{key} must be one of {list(choices)}, got {value!r}.")


def check_file(path: str, key: str) -> Path:
    """The path of a file with something in it."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"data.{key}={path} is a directory: name the file inside it.")
    if not file.exists():
        there = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        match = difflib.get_close_matches(file.name, there, n=1)
        hint = f" Did you mean {file.parent / match[0]}?" if match else ""
        raise UserError(f"data.{key}={path}: there is no such file.{hint} Check data.{key}.")
    if file.stat().st_size == 0:
        raise UserError(f"data.{key}={path} is an empty file: give one with a prompt in each row.")
    return file


def columns_and_match(name: str, found: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(found), n=1, cutoff=0.5)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    return f"columns found: {sorted(found)}{hint}"


def no_such_column(path: Path, name: str, found: Iterable[str]) -> UserError:
    return UserError(
        f"{path} has no column {name!r}; {columns_and_match(name, found)} Set the column names"
        " under data (question_column, answer_column, solution_column, id_column)."
    )
