import json
from pathlib import Path

import pytest

from rlzoo.data.files import check_shards, content, data_files
from rlzoo.data.prompts import FilePrompts
from rlzoo.data.readers import read_rows
from rlzoo.errors import UserError
from tests.data.file_cases import CHAT, GIVEN, outcomes, table

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_every_file_is_read_or_refused_as_the_table_in_docs_says(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    found = outcomes(lambda: tmp_path_factory.mktemp("case"))
    assert [prompts for prompts, _ in found] == [case.prompts for case in GIVEN]
    # `python -m tests.data.file_cases` prints the table that docs/data.md should hold.
    assert table([told for _, told in found]) in DOCS.read_text(encoding="utf-8")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": 1}\n')
    rows = read_rows(path, ["question"])
    next(rows)
    with path.open("a") as file:
        file.write('{"question": "r", "answer": 1}\n')
    with pytest.raises(UserError, match="was changed while it was read"):
        list(rows)


def test_a_file_is_known_by_what_it_holds_and_not_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    for data, kind in ((b' {"a": 1}', "jsonl"), (b" \n[1]", "jsonl"), (b"a,b\n", "csv")):
        path.write_bytes(data)
        assert content(path).kind == kind
    path.write_bytes(b"PAR1 and more")
    assert content(path, "parquet").kind == "parquet"


def test_several_sets_of_shards_are_each_complete(tmp_path: Path) -> None:
    names = [f"{name}-0000{i}-of-00002.parquet" for name in ("a", "b") for i in (0, 1)]
    check_shards([tmp_path / name for name in names], "data.path=x")
    with pytest.raises(UserError, match="1 of the 2 files of b: number 0 is missing"):
        check_shards([tmp_path / name for name in names if name != names[2]], "data.path=x")


@pytest.mark.parametrize("path", ["openai/gsm8k", "hf://datasets/openai/gsm8k/main/a.parquet"])
def test_the_name_of_a_data_set_on_a_hub_is_no_path(path: str) -> None:
    with pytest.raises(UserError, match="there is no such file. If it is the name of a data set"):
        data_files(path, "path", "auto")


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    assert data_files("~/a.jsonl", "path", "auto") == [tmp_path / "a.jsonl"]
    assert len(data_files("~/*.jsonl", "path", "auto")) == len(data_files("~", "path", "auto")) == 2


def test_a_chat_keeps_its_turns_and_gives_its_text(tmp_path: Path) -> None:
    tool = CHAT[1] | {"name": "Ann", "tool_calls": None}
    rows = [{"m": [*CHAT[:1], tool], "answer": 2}, {"m": "plain", "answer": 3}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat, plain = FilePrompts(str(tmp_path / "rows.jsonl"), "m", "answer", val_fraction=0).load(
        "train"
    )
    assert chat.turns == (CHAT[0], CHAT[1] | {"name": "Ann"})
    assert plain.turns is None and plain.question == "plain"
