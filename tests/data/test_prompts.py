import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlzoo.data.prompts import ANSWER_FORMATS, BadRow, FilePrompts
from rlzoo.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"
Writer = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes rows, or lines of text as they stand, to a JSONL file."""

    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write_rows


def rows(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(count)]


def source(path: str | None, **options: Any) -> FilePrompts:
    defaults = {"question_column": "question", "answer_column": "answer", "val_fraction": 0.0}
    return FilePrompts(path, **(defaults | options))


# --- answer formats


@pytest.mark.parametrize(
    ("answer_format", "value", "expected"),
    [
        ("plain", " 7 ", "7"),
        ("plain", 7, "7"),
        ("plain", 27.0, "27"),
        ("plain", 0.25, "0.25"),
        ("boxed", r"so \boxed{1}, no: \boxed{\frac{1}{2}} cm", r"\frac{1}{2}"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{a \} b}", r"a \} b"),
        ("boxed", r"so \boxed{4}, hence \fbox{$5$} apples", "$5$"),  # both stand in MATH
        ("boxed", r"so it is $\boxed 5$.", "5"),
        ("hashes", "He has 2 #### of them\n#### 1,234,567", "1234567"),
        ("hashes", "#### -3", "-3"),
        ("hashes", "#### (1,2)", "(1,2)"),
        ("first", ["$2^{k}$", "7"], "$2^{k}$"),
        ("first", [4.0], "4"),
    ],
)
def test_each_answer_format_finds_the_answer(answer_format: str, value: Any, expected: str) -> None:
    assert ANSWER_FORMATS[answer_format](value) == expected


@pytest.mark.parametrize(
    ("answer_format", "value"),
    [
        ("plain", "  "),
        ("plain", float("nan")),
        ("plain", ["1"]),
        ("plain", "\ud800"),
        ("boxed", "the answer is 3"),
        ("boxed", r"\boxed{\frac{1}{2}"),
        ("boxed", r"\boxed{ }"),
        ("boxed", r"\boxed{5}, so \boxed{\frac12"),
        ("hashes", "the answer is 3"),
        ("hashes", "it is ####"),
        ("first", []),
        ("first", "3"),
    ],
)
def test_a_value_without_an_answer_in_it_is_refused(answer_format: str, value: Any) -> None:
    with pytest.raises(BadRow):
        ANSWER_FORMATS[answer_format](value)


@given(st.lists(st.sampled_from(["{", "}", "x", "\\{", "\\}", "1"])).map("".join))
def test_a_boxed_answer_with_balanced_braces_comes_back_whole(inside: str) -> None:
    depths = [inside[:i].replace("\\{", "").replace("\\}", "") for i in range(len(inside) + 1)]
    balanced = all(d.count("{") >= d.count("}") for d in depths)
    if not (balanced and depths[-1].count("{") == depths[-1].count("}") and inside.strip()):
        return
    assert ANSWER_FORMATS["boxed"](f"so $\\boxed{{{inside}}}$ metres {{}}") == inside


# --- files


def test_a_jsonl_file_gives_its_rows_in_order(write: Writer) -> None:
    path = write(['{"question": "What is 2 + 2?", "answer": 4.0, "why": "2+2=4"}', "", *rows(2)])
    prompts = source(path, solution_column="why").load("train")
    assert [p.question for p in prompts] == ["What is 2 + 2?", "What is 0 + 1?", "What is 1 + 1?"]
    assert [p.answer for p in prompts] == ["4", "1", "2"]
    assert [p.solution for p in prompts] == ["2+2=4", None, None]


def test_a_parquet_file_gives_the_same_prompts_as_the_jsonl_file(
    write: Writer, tmp_path: Path
) -> None:
    table = [{"question": f"q{i}", "answer": [f"{i}", "x"], "more": i} for i in range(20)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet", row_group_size=7
    )
    from_jsonl = source(write(table), answer_format="first").load("train")
    from_parquet = source(
        str(tmp_path / "rows.parquet"), answer_format="first", file_format="parquet"
    ).load("train")
    assert from_parquet == from_jsonl
    assert len(from_parquet) == 20


def test_gsm8k_solutions_end_in_a_box_and_have_no_calculator_notes(write: Writer) -> None:
    config = OmegaConf.load(CONF / "gsm8k.yaml")
    options = {key: config[key] for key in ("solution_column", "answer_format")}
    row = {"question": "How many?", "answer": "3*400=<<3*400=1200>>1200\n#### 1,200"}
    (prompt,) = source(write([row]), **options).load("train")
    assert (prompt.answer, prompt.solution) == ("1200", "3*400=1200\n\\boxed{1200}")


def test_the_solution_is_the_first_where_a_row_lists_several(write: Writer) -> None:
    table = [row | {"why": ["one way", "another"]} for row in rows(1)]
    (prompt,) = source(write(table), solution_column="why").load("train")
    assert prompt.solution == "one way"


def test_the_id_of_a_prompt_depends_on_its_question_alone(write: Writer) -> None:
    some = source(write(rows(5))).load("train")
    others = source(write([{**row, "answer": 0} for row in rows(9)][::-1])).load("train")
    ids = {p.question: p.id for p in others}
    assert [ids[p.question] for p in some] == [p.id for p in some]
    assert len(set(ids.values())) == 9


def test_ids_come_from_the_id_column_when_one_is_named(write: Writer) -> None:
    table = [row | {"key": 10 * i} for i, row in enumerate(rows(3))]
    prompts = source(write(table), id_column="key").load("train")
    assert [p.id for p in prompts] == ["0", "10", "20"]


# --- splits


def test_the_hash_splits_partition_the_file_in_the_shares_asked_for(write: Writer) -> None:
    prompts = source(write(rows(2000)), val_fraction=0.1, test_fraction=0.2)
    ids = {split: [p.id for p in prompts.load(split)] for split in ("train", "val", "test")}
    assert sum(map(len, ids.values())) == len(set().union(*ids.values())) == 2000
    assert abs(len(ids["val"]) - 200) < 60 and abs(len(ids["test"]) - 400) < 80


def test_the_split_of_a_prompt_does_not_depend_on_the_other_rows(write: Writer) -> None:
    whole = source(write(rows(400)), val_fraction=0.2)
    part = source(write(rows(400)[::-3], "part.jsonl"), val_fraction=0.2, test_fraction=0.3)
    in_val = {p.id for p in whole.load("val")}
    in_part = {p.id for split in ("train", "val", "test") for p in part.load(split)}
    assert {p.id for p in part.load("val")} == in_val & in_part
    assert 0 < len(in_val) < 400


def test_another_seed_gives_another_split(write: Writer) -> None:
    path = write(rows(400))
    splits = [source(path, val_fraction=0.2, seed=seed).load("val") for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_a_split_with_its_own_file_takes_nothing_from_the_training_file(write: Writer) -> None:
    val = [{"question": "What is 6 * 7?", "answer": 42}]
    both = source(write(rows(100)), val_path=write(val, "val.jsonl"), val_fraction=0.5)
    assert len(both.load("train")) == 100
    assert [p.answer for p in both.load("val")] == ["42"]


def test_max_prompts_is_a_seeded_choice_that_grows_with_its_size(write: Writer) -> None:
    path = write(rows(50))
    small, large, other = (
        [p.id for p in source(path, max_prompts=count, seed=seed).load("train")]
        for count, seed in ((10, 0), (20, 0), (10, 1))
    )
    assert len(small) == 10 and len(large) == 20
    assert set(small) < set(large) and small != other
    in_file = [p.id for p in source(path).load("train")]
    assert [i for i in in_file if i in large] == large != in_file[:20]


# --- bad rows

BAD_ROWS = [
    ({"question": "q", "answer": None}, "'answer'"),
    ({"question": "q"}, "'answer'"),
    ({"question": " ", "answer": 1}, "'question'"),
    ({"answer": 1}, "'question'"),
    ('{"question": "q", "ans', "not JSON"),
    ("[1, 2]", "list"),
    ({"question": "What is 1 + 1?", "answer": 2}, "line 2"),
]


@pytest.mark.parametrize(("bad", "named"), BAD_ROWS)
def test_a_bad_row_is_an_error_that_names_file_line_and_cause(
    write: Writer, bad: Any, named: str
) -> None:
    path = write([*rows(3), bad])
    with pytest.raises(UserError) as caught:
        source(path).load("train")
    message = str(caught.value)
    assert f"{path}, line 4" in message and named in message
    assert "data.on_bad_row=skip" in message


def test_bad_rows_are_skipped_counted_and_reported_once(
    write: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write([*rows(20), *(bad for bad, _ in BAD_ROWS), {"question": "last", "answer": 99}])
    prompts = source(path, on_bad_row="skip", val_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        found = [*prompts.load("train"), *prompts.load("val"), *prompts.load("train")]
    assert {int(p.answer) for p in found} == {*range(1, 21), 99}
    (record,) = caplog.records
    assert f"{len(BAD_ROWS)} rows" in record.getMessage()


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": 1}\n{"question": "\xff"}\n')
    with pytest.raises(UserError, match="line 2.*utf-8"):
        source(str(path)).load("train")
    assert len(source(str(path), on_bad_row="skip").load("train")) == 1


def test_a_null_in_a_parquet_file_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"question": ["a", "b"], "answer": ["1", None]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match="line 2: column 'answer' .* is null"):
        source(str(path), file_format="parquet").load("train")


# --- unusable files and settings


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_a_column_that_is_not_there_is_named_with_its_near_match(
    write: Writer, tmp_path: Path, file_format: str, on_bad_row: str
) -> None:
    path = write(rows(3))
    if file_format == "parquet":
        path = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(3)), path)
    prompts = source(
        path, question_column="qestion", file_format=file_format, on_bad_row=on_bad_row
    )
    with pytest.raises(UserError) as caught:
        prompts.load("train")
    message = str(caught.value)
    assert "'qestion'" in message and "['answer', 'question']" in message
    assert "did you mean 'question'?" in message


def test_a_solution_column_that_no_row_has_is_an_error(write: Writer) -> None:
    with pytest.raises(UserError, match="no column 'why'"):
        source(write(rows(3)), solution_column="why").load("train")


def test_a_missing_file_is_an_error_with_its_near_match(write: Writer) -> None:
    path = write(rows(1), "train.jsonl")
    with pytest.raises(UserError, match=r"no such file.*mean .*train\.jsonl"):
        source(path.replace("train", "trian")).load("train")
    with pytest.raises(UserError, match=r"data\.val_path=nowhere"):
        source(path, val_path="nowhere/val.jsonl").load("val")


def test_a_directory_or_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        source(str(tmp_path)).load("train")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is an empty file"):
        source(str(tmp_path / "empty.jsonl")).load("train")


def test_a_file_without_a_usable_row_is_an_error(write: Writer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable row"):
        source(write(["", ""])).load("train")
    with pytest.raises(UserError, match="no usable row.*line 1"):
        source(write(["nonsense"]), on_bad_row="skip").load("train")
    empty = pyarrow.table({"question": [], "answer": []})
    pyarrow.parquet.write_table(empty, tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no usable row"):
        source(str(tmp_path / "none.parquet"), file_format="parquet").load("train")


def test_a_file_that_is_not_parquet_is_an_error(write: Writer) -> None:
    with pytest.raises(UserError, match="not a readable parquet file"):
        source(write(rows(3)), file_format="parquet").load("train")


def test_a_split_without_prompts_is_an_error_that_names_the_key(write: Writer) -> None:
    path = write(rows(3))
    with pytest.raises(UserError, match=r"data\.test_fraction.*data\.test_path"):
        source(path).load("test")
    with pytest.raises(UserError, match=r"data\.val_fraction"):
        source(path, val_fraction=0.9999).load("train")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"path": None}, "data.path"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "data.test_fraction"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(
    options: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        source(**({"path": "rows.jsonl"} | options))
