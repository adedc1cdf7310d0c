"""Prompts from files, with columns and answer formats of one's choosing, and their splits."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from rlzoo.data.answers import ANSWER_FORMATS, BadRow, hashes, text_of, turns_and_text
from rlzoo.data.files import content, data_files
from rlzoo.data.readers import columns_and_match, no_such_column, read_rows, value_at
from rlzoo.data.templates import PromptTemplate
from rlzoo.errors import UserError
from rlzoo.types import Prompt
from rlzoo.values import AtLeast1, PathText, Seed, ShareBelow1, Text

log = logging.getLogger(__name__)

T = TypeVar("T")


class PromptSource(Protocol):
    """What `data=` chooses: where prompts come from, and how they are rendered."""

    template: PromptTemplate

    def load(self, split: str) -> list[Prompt]:
        """The prompts of "train", "val" or "test", not yet rendered."""


# --- the source ---------------------------------------------------------------------------------


class FilePrompts:
    """The prompt source behind `data=file`, `data=jsonl`, `data=parquet` and `data=gsm8k`.

    Args:
        path: the training prompts: a file, a folder of them, or a pattern (`train-*.parquet`).
        question_column, answer_column: names in the file; dots lead into objects and lists
            (`extra_info.answer`, `messages.0.content`). A question may be a chat, a list of turns
            of `role` and `content`: it is the whole prompt then, to which `template` adds nothing.
        val_path, test_path: files of the other splits. Where one is None, the split is taken from
            `path` by a hash of question and seed, and leaves the training prompts.
        val_fraction, test_fraction: shares of `path` that are taken so, in [0, 1).
        solution_column: worked solutions, if any. When it is also the answer column and answers
            stand after `####`, the solution is the text before, without calculator notes
            (`<<48/2=24>>`), and the answer in a box.
        id_column: unique ids; None makes them from a hash of the question.
        file_format: a name from FORMATS, or `auto`: what the file looks like.
        answer_format: a name from ANSWER_FORMATS.
        on_bad_row: `error` stops at a row without question or answer, an unreadable one, or one
            that repeats the id or the question of another; `skip` leaves it out and counts it.
        val_prompts: most validation prompts, likewise a seeded choice; the others of that split lie
            idle, which is said. None: all.
        max_prompts: most prompts of a split, a seeded choice in the order of the file; None: all.
        seed: of the splits and of that choice.
        template: how a question becomes tokens.

    Raises:
        UserError: no path, or no training prompts; in `load`, a file that cannot be used.
    """

    def __init__(
        self,
        path: PathText | None,
        question_column: Text,
        answer_column: Text,
        *,
        val_path: PathText | None = None,
        test_path: PathText | None = None,
        val_fraction: ShareBelow1 = 0.05,
        test_fraction: ShareBelow1 = 0.0,
        solution_column: Text | None = None,
        id_column: Text | None = None,
        file_format: Literal["auto", "jsonl", "parquet", "csv"] = "jsonl",
        answer_format: Literal["plain", "boxed", "hashes", "first"] = "plain",
        on_bad_row: Literal["error", "skip"] = "error",
        max_prompts: AtLeast1 | None = None,
        val_prompts: AtLeast1 | None = None,
        seed: Seed = 0,
        template: PromptTemplate | None = None,
    ) -> None:
        if path is None:
            raise UserError("data.path is not set: give the training file as data.path=FILE.")
        if val_fraction + test_fraction >= 1:
            raise UserError(
                "data.val_fraction and data.test_fraction must be together below 1, so that"
                f" training prompts are left; got {val_fraction} and {test_fraction}."
            )
        self.path, self.paths = path, {"val": val_path, "test": test_path}
        self.question_column, self.answer_column = question_column, answer_column
        self.solution_column, self.id_column = solution_column, id_column
        self.file_format, self.answer_format = file_format, answer_format
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.on_bad_row, self.seed = on_bad_row, seed
        self.max_prompts, self.val_prompts = max_prompts, val_prompts
        self.template = template or PromptTemplate()
        self._read: dict[str, list[Prompt]] = {}  # by path: a file is read and reported on once
        self._splits: list[str] = []  # of the prompts of `path`

    def load(self, split: str) -> list[Prompt]:
        """The prompts of `train`, `val` or `test`, in the order of their file.

        Raises:
            UserError: a missing, empty or unreadable file, a column it has not, a bad row under
                `on_bad_row=error`, or a split without prompts.
        """
        if (path := self.paths.get(split)) is not None:
            prompts = self.read(path, f"{split}_path")
        else:
            prompts = self.read(self.path, "path")
            self._splits = self._splits or [self.split_of(prompt) for prompt in prompts]
            pairs = zip(prompts, self._splits, strict=True)
            prompts = [prompt for prompt, its_split in pairs if its_split == split]
        if not prompts:
            mend = f"Raise data.{split}_fraction or give data.{split}_path=FILE."
            if split == "train":
                mend = "Lower data.val_fraction or give more rows."
            raise UserError(f"The {split} split of {self.path} has no prompts. {mend}")
        most = self.most(split)
        if most is None or len(prompts) <= most:
            return list(prompts)
        if split == "val" and most == self.val_prompts:
            log.info(
                f"data.val_prompts={most} of {len(prompts):,} validation prompts are validated on,"
                " the others lie idle (data.val_fraction, data.val_path)."
            )
        chosen = sorted(prompts, key=lambda prompt: self.uniform("choice", prompt.id))
        keep = {prompt.id for prompt in chosen[:most]}
        return [prompt for prompt in prompts if prompt.id in keep]

    def most(self, split: str) -> int | None:
        """Most prompts of a split; None without a limit."""
        limits = [self.max_prompts, self.val_prompts if split == "val" else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def split_of(self, prompt: Prompt) -> str:
        """The split that a prompt of `path` is in; more test prompts never move a val prompt.

        By the question, so that one that stands in the file twice is never in two splits.
        """
        position = self.uniform("split", question_id(" ".join(prompt.question.split())))
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
        """All good rows of a path's files as prompts; `key` is the setting it came from."""
        if path not in self._read:
            self._read[path] = self.read_files(path, data_files(path, key, self.file_format))
        return self._read[path]

    def read_files(self, path: str, files: Sequence[Path]) -> list[Prompt]:
        names = (self.question_column, self.answer_column, self.solution_column, self.id_column)
        columns = list(dict.fromkeys(name for name in names if name is not None))
        kept = Kept()
        unmet = set(columns)
        found: dict[str, None] = {}  # columns, in the order they were met
        problems: list[str] = []
        for place, row in rows_of(files, columns, self.file_format):
            try:
                if isinstance(row, BadRow):
                    raise row
                found |= dict.fromkeys(row)
                unmet = {name for name in unmet if not has(row, name)}
                kept.add(self.to_prompt(row), place)
            except BadRow as problem:
                problems.append(f"{place}: {problem}")
                if self.on_bad_row == "error":
                    raise UserError(
                        f"{problems[0]}. Mend the row, or leave such rows out with"
                        " data.on_bad_row=skip."
                    ) from None
        for name in columns:
            if found and name in unmet:
                raise no_such_column(files[0], name, found)
        if not kept.prompts:
            detail = f" First problem: {problems[0]}." if problems else ""
            raise UserError(f"{path} holds no usable row.{detail}")
        if problems:
            count = f", {kept.conflicts} of them with another answer to the same question"
            log.warning(
                f"{len(problems)} rows of {path} skipped{count * (kept.conflicts > 0)};"
                f" first: {problems[0]}"
            )
        return kept.prompts

    def to_prompt(self, row: dict[str, Any]) -> Prompt:
        """Raises BadRow, naming the column, for a row that cannot be used."""
        turns, question = self.field(row, "question_column", turns_and_text)
        answer = self.field(row, "answer_column", ANSWER_FORMATS[self.answer_format])
        if self.id_column is None:
            prompt_id = question_id(question, turns)
        else:
            prompt_id = self.field(row, "id_column", text_of)
        solution = self.solution(row)
        return Prompt(prompt_id, question, answer, solution=solution, turns=turns)

    def field(self, row: dict[str, Any], key: str, convert: Callable[[Any], T]) -> T:
        """What stands in the column that setting `key` names."""
        name = getattr(self, key)
        try:
            value = value_at(row, name)
        except KeyError:
            near = columns_and_match(name, row)
            raise BadRow(f"has no column {name!r} (data.{key}); {near}") from None
        if name in getattr(row, "repeated", ()):
            raise BadRow(f"has column {name!r} (data.{key}) twice")
        if value is None:
            raise BadRow(f"column {name!r} (data.{key}) is null")
        try:
            return convert(value)
        except BadRow as problem:
            raise BadRow(f"column {name!r} (data.{key}) {problem}") from None

    def solution(self, row: dict[str, Any]) -> str | None:
        """The worked solution; None where the row has none, which is no fault."""
        name = self.solution_column
        if name is None or not has(row, name) or value_at(row, name) is None:
            return None
        value = value_at(row, name)
        if isinstance(value, list) and value:  # alternative solutions, the first as good as any
            value = value[0]
        if isinstance(value, str) and not value.strip():
            return None
        if name == self.answer_column and self.answer_format == "hashes":
            # GSM8K's calculator notes go; the answer is boxed, as prompts and rewards ask for it.
            text = re.sub(r"<<.*?>>", "", text_of(value).rpartition("####")[0]).strip()
            return f"{text}\n\\boxed{{{hashes(value)}}}"
        try:
            return text_of(value)
        except BadRow as problem:
            raise BadRow(f"column {name!r} (data.solution_column) {problem}") from None


# --- rows ---------------------------------------------------------------------------------------


class Kept:
    """The prompts of the rows read so far, no id and no question twice."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.places: list[str] = []
        self.conflicts = 0  # repeated questions with another answer
        self._by_id: dict[str, int] = {}
        self._by_question: dict[str, int] = {}

    def add(self, prompt: Prompt, place: str) -> None:
        """Raises BadRow for a repeated id or question."""
        key = question_id(prompt.question, prompt.turns)
        index = self._by_question.get(key)
        what = f"prompt {prompt.id!r}"
        if index is None:
            index = self._by_id.get(prompt.id)
        elif self.prompts[index].id != prompt.id:
            what = f"the question of prompt {self.prompts[index].id!r}"
        if index is not None:
            old, other = self.prompts[index], ""
            if old.answer != prompt.answer and key in self._by_question:
                self.conflicts += 1
                other = f", with another answer ({prompt.answer!r}, there {old.answer!r})"
            raise BadRow(f"repeats {what} of {self.places[index]}{other}")
        self._by_id[prompt.id] = self._by_question[key] = len(self.prompts)
        self.prompts.append(prompt)
        self.places.append(place)


def rows_of(
    files: Sequence[Path], columns: Sequence[str], file_format: str
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(where it stands, row) of every row of every file."""
    for file in files:
        unit = "row" if content(file, file_format).is_array else "line"
        for number, row in read_rows(file, columns, file_format):
            yield f"{file}, {unit} {number}", row


def has(row: dict[str, Any], name: str) -> bool:
    try:
        value_at(row, name)
    except KeyError:
        return False
    return True


def question_id(question: str, turns: Sequence[dict[str, Any]] | None = None) -> str:
    """An id that depends on the question, or the chat, alone."""
    text = question if turns is None else json.dumps(turns, sort_keys=True, default=str)
    return f"prompt-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
