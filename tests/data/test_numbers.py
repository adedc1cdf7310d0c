"""The number in the file is the number compared: by the verifier, against ordinary notation."""

import datetime
import decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlzoo.data.answers import BadRow, first, plain
from rlzoo.data.prompts import FilePrompts
from rlzoo.errors import UserError
from rlzoo.rewards.base import Verdict
from rlzoo.rewards.math import verdict

JSON = [  # what the file says, the gold answer, a response that gives it
    ("0.000015", "0.000015", "0.000015"),
    ("1.5e-05", "0.000015", r"1.5\times 10^{-5}"),
    ("1E5", "100000", "100,000"),
    ("1e22", "1" + 22 * "0", "10^{22}"),
    ("1" + 30 * "0", "1" + 30 * "0", "1" + 30 * "0"),
    ("9007199254740993", "9007199254740993", "9007199254740993"),  # no float64
    ("0.1234567890123456789", "0.1234567890123456789", "0.1234567890123456789"),
    ("-0.0", "0", "0"),
    ("0.00", "0", "0"),
    ("27.0", "27", "27"),
    ("1.50", "1.50", "1.5"),
    ("-3.25", "-3.25", r"-\frac{13}{4}"),
    ("true", "true", "True"),
    ("false", "false", r"\text{false}"),
    ('"1.5e-05"', "0.000015", "0.000015"),
    ('"-2E+3"', "-2000", "-2000"),
    ('"1,234"', "1,234", "1234"),
    ('"1\\u202f234"', "1234", "1234"),
    ('"\\u22125"', "-5", "-5"),
    ('"\\uff11\\uff12"', "12", "12"),
    ('"27.0"', "27.0", "27"),
    ('"50%"', "50%", r"50\%"),
    ('"$5"', "$5", "5"),
    ('"\\\\frac{1}{2}"', r"\frac{1}{2}", "0.5"),
    ('"2e"', "2e", "2e"),  # a product with Euler's number stays one
]
PARQUET = [
    (pyarrow.float32(), 0.1, "0.1"),
    (pyarrow.float32(), 1.5e-05, "0.000015"),
    (pyarrow.float16(), np.float16(0.1), "0.1"),
    (pyarrow.float64(), 0.1, "0.1"),
    (pyarrow.float64(), 1e22, "1" + 22 * "0"),
    (pyarrow.float64(), 27.0, "27"),
    (pyarrow.decimal128(10, 2), decimal.Decimal("27.00"), "27"),
    (pyarrow.decimal128(12, 8), decimal.Decimal("0.00000015"), "0.00000015"),
    (pyarrow.uint64(), 2**64 - 1, "18446744073709551615"),
    (pyarrow.int8(), -7, "-7"),
    (pyarrow.bool_(), True, "true"),
    (pyarrow.binary(), b"1.5e-05", "0.000015"),
    (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "7", "7"),
]


def golds(path: Path, **options: Any) -> list[str]:
    return [prompt.answer for prompt in load(path, **options)]


def load(path: Path, **options: Any) -> list:
    options = {"val_fraction": 0.0, "file_format": "auto"} | options
    return FilePrompts(str(path), "question", "answer", **options).load("train")


def test_a_number_in_json_is_compared_as_it_is_written(tmp_path: Path) -> None:
    lines = [f'{{"question": "q{i}", "answer": {text}}}' for i, (text, *_) in enumerate(JSON)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert golds(tmp_path / "rows.jsonl") == [gold for _, gold, _ in JSON]
    (tmp_path / "rows.json").write_text(f"[{', '.join(lines)}]")
    assert golds(tmp_path / "rows.json") == [gold for _, gold, _ in JSON]
    wrong = [
        (text, response)
        for text, gold, response in JSON
        if verdict(gold, rf"\boxed{{{response}}}") != Verdict.RIGHT
    ]
    assert wrong == []


def test_numbers_keep_their_digits_in_lists_and_solutions_and_ids(tmp_path: Path) -> None:
    row = '{"question": 0.000015, "answer": [1e-7, 2], "why": 2.50, "id": 12345678901234567890123}'
    (tmp_path / "rows.jsonl").write_text(row)
    (prompt,) = load(
        tmp_path / "rows.jsonl", answer_format="first", solution_column="why", id_column="id"
    )
    expected = ("0.000015", "0.0000001", "2.50", "12345678901234567890123")
    assert (prompt.question, prompt.answer, prompt.solution, prompt.id) == expected


def test_a_number_in_parquet_has_the_digits_of_its_own_width(tmp_path: Path) -> None:
    for kind, value, gold in PARQUET:
        table = pyarrow.table({"question": ["q"], "answer": pyarrow.array([value], kind)})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        assert golds(tmp_path / "rows.parquet") == [gold], kind
    nested = pyarrow.struct([("all", pyarrow.list_(pyarrow.float32()))])
    cells = pyarrow.array([{"all": [0.1, 0.2]}, {"all": [0.3]}], nested)
    table = pyarrow.table({"question": ["q", "r"], "answer": cells})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    options = {"answer_format": "first", "val_fraction": 0.0, "file_format": "auto"}
    source = FilePrompts(str(tmp_path / "rows.parquet"), "question", "answer.all", **options)
    assert [prompt.answer for prompt in source.load("train")] == ["0.1", "0.3"]


def test_a_number_in_csv_is_compared_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('question,answer\nq,1.5e-05\nr,"1,234.50"\ns,27.0\n')
    found = golds(tmp_path / "rows.csv")
    assert found == ["0.000015", "1,234.50", "27.0"]
    for gold, response in zip(found, ("0.000015", "1234.5", "27"), strict=True):
        assert verdict(gold, rf"\boxed{{{response}}}") == Verdict.RIGHT


def test_a_list_written_as_text_gives_its_first_with_its_digits() -> None:
    assert first('["18", "19"]') == "18" and first("[1e-7]") == "0.0000001"
    assert plain("[1, 2]") == "[1, 2]"  # an interval
    with pytest.raises(BadRow, match="a list written as text that is not JSON"):
        first("['18']")


def test_numbers_of_python_and_numpy_are_written_out() -> None:
    assert plain(np.float32(0.1)) == plain(np.float64(0.1)) == plain(0.1) == "0.1"
    assert plain(np.int64(5)) == "5" and plain(Fraction(1, 3)) == "1/3"
    assert plain(10**400) == "1" + 400 * "0"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (decimal.Decimal("NaN"), "nan"),
        (decimal.Decimal("-Infinity"), "infinity"),
        (decimal.Decimal("1e999999999"), "more than 4000 places"),
        (np.float32("nan"), "nan"),
        (complex(1, 2), "complex"),
        (datetime.date(2024, 1, 1), "a date.*write it as text"),
        (b"\xff", "not UTF-8"),
        ([1, 2], "answer_format=first"),
        ({"text": "1"}, r"\['text'\]"),
        ('["18"]', "answer_format=first"),
        ("48/2=24\n#### 24", "answer_format=hashes"),
    ],
)
def test_a_value_that_is_no_answer_is_refused_with_its_mend(value: Any, named: str) -> None:
    with pytest.raises(BadRow, match=named):
        plain(value)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999999999", '"nan"', '" NaN "'])
def test_a_number_that_is_none_is_a_bad_row(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"question": "q", "answer": {text}}}\n')
    with pytest.raises(UserError, match=r"line 1: column 'answer'.* is "):
        golds(tmp_path / "rows.jsonl")
