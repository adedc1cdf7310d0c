import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlzoo.data import leaks
from rlzoo.data.leaks import apart
from rlzoo.data.prompts import FilePrompts
from rlzoo.errors import UserError
from rlzoo.types import Prompt


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(path: str, **options: Any) -> FilePrompts:
    return FilePrompts(path, "question", "answer", **options)


def prompt(name: str, tokens: tuple[int, ...], answer: str = "1") -> Prompt:
    return Prompt(name, name, answer, token_ids=tokens)


# --- within a file


def test_questions_that_differ_in_spaces_alone_are_in_one_split_whatever_their_ids(
    tmp_path: Path,
) -> None:
    rows = [
        {"question": f"What is{space}{i} + 1?", "answer": i + 1, "id": f"{i}-{ord(space[-1])}"}
        for i in range(200)
        for space in (" ", " \t", "\n")
    ]
    prompts = source(write(tmp_path / "rows.jsonl", rows), id_column="id", val_fraction=0.3)
    sides = [{p.id.partition("-")[0] for p in prompts.load(split)} for split in ("train", "val")]
    assert len(sides[0]) + len(sides[1]) == 200 and not sides[0] & sides[1]
    assert 30 < len(sides[1]) < 90


@pytest.mark.parametrize(
    ("answer", "named"),
    [(2, "question of prompt 'a'"), (3, "with another answer .'3', there '2'.")],
)
def test_a_question_under_two_ids_is_a_bad_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: int, named: str
) -> None:
    rows = [{"question": q, "answer": 2, "id": name} for q, name in (("1 + 1?", "a"), ("2?", 9))]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[0] | {"id": "b", "answer": answer}])
    with pytest.raises(UserError, match=f"line 3: repeats .* line 1.*{named}|{named}"):
        source(path, id_column="id", val_fraction=0.0).load("train")
    kept = source(path, id_column="id", val_fraction=0.0, on_bad_row="skip").load("train")
    assert [(p.id, p.answer) for p in kept] == [("a", "2"), ("9", "2")]
    conflicts = "1 of them with another answer" in caplog.text
    assert "1 rows" in caplog.text and conflicts == (answer == 3)


def test_a_question_that_two_files_of_a_folder_hold_is_told_with_both_places(
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"question": "1 + 1?", "answer": 2, "id": name}])
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: repeats .*a\.jsonl, line 1"):
        source(str(tmp_path), id_column="id", val_fraction=0.0).load("train")


# --- between splits


def test_overlap_is_told_by_the_rendered_prompt_and_not_by_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train = [prompt("a", (1, 2)), prompt("b", (3, 4)), prompt("c", (5,))]
    val = [prompt("x", (3, 4)), prompt("c", (6,)), prompt("y", (5,), answer="2")]
    with caplog.at_level(logging.WARNING):
        assert apart(train, val) == train
    assert "2 of 3 validation prompts are also trained on" in caplog.text
    assert "'b', in validation 'x'" in caplog.text and "1 with another answer" in caplog.text
    assert apart(train, val, "drop") == train[:1]
    assert "2 training prompts dropped" in caplog.text
    with pytest.raises(UserError, match="on_overlap=drop"):
        apart(train, val, "error")


def test_prompts_that_overlap_nowhere_are_kept_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train, val = [prompt("a", (1, 2)), prompt("b", (1, 2, 3))], [prompt("a", (1,))]
    for on_overlap in ("warn", "drop", "error"):
        assert apart(train, val, on_overlap) == train
    assert caplog.text == ""


def test_training_prompts_that_are_rendered_alike_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train = [prompt("a", (1,)), prompt("b", (1,)), prompt("c", (1,), answer="2"), prompt("d", (2,))]
    assert apart(train, []) == train
    assert "2 training prompts are rendered like one before" in caplog.text
    assert "1 of them with another answer" in caplog.text and "'b', like 'a'" in caplog.text


# --- between ranks


def test_ranks_that_read_other_prompts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = [prompt("a", (1, 2)), prompt("b", (3,))], [prompt("c", (4,))]
    told: list[tuple] = []
    monkeypatch.setattr(leaks, "all_gather", lambda value: told.append(value) or list(told))
    for same in (train, [prompt("a", (1, 2)), prompt("b", (3,))]):
        leaks.check_alike(same, val)
    for other in ([prompt("a", (1, 2)), prompt("b", (5,))], [*train[:1], prompt("b", (3,), "9")]):
        del told[2:]
        with pytest.raises(UserError, match="Rank 2 read other prompts than rank 0: 2 and 1"):
            leaks.check_alike(other, val)
    del told[2:]
    with pytest.raises(UserError, match="Rank 2 .* 2 and 0 of validation, against 2 and 1"):
        leaks.check_alike(train, [])
