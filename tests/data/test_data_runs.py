"""What a run makes of its files, as a user meets it: on the command line."""

import gzip
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from rlzoo.models.policy import load_tokenizer
from tests import warm

FILE = (
    *(setting for setting in warm.SMALL if not setting.startswith("data.")),
    *("data=file", "data.template.system=null", "data.template.user_suffix=''"),
    "limits.max_responses=16",
)
ROWS = [{"question": f"{i}+{i}", "answer": 2 * i, "id": f"train-{i}"} for i in range(1, 17)]


def write(path: Path, rows: list[dict | str]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"data.path={path}"


def test_a_run_is_scored_by_the_numbers_in_its_file_and_tells_what_it_also_validates_on(
    tmp_path: Path,
) -> None:
    small = '{"question": "3/200000", "answer": 0.000015, "id": "small"}'
    train = write(tmp_path / "train.jsonl", [*ROWS[:7], small])
    val = write(tmp_path / "val.jsonl", [ROWS[3] | {"id": "val-3"}, ROWS[9]])
    output = warm.passed(
        *(tmp_path / "run", *FILE, train, val.replace("path", "val_path"), "data.id_column=id"),
        small=False,
    )
    assert "1 of 2 validation prompts are also trained on" in output
    assert "'train-4', in validation 'val-3'" in output
    table = pyarrow.parquet.read_table(tmp_path / "run/rollouts/step_000000.parquet").to_pylist()
    answers = {row["prompt_id"]: row["answer"] for row in table}
    assert len(answers) == 4 and set(answers) <= {"small", *(row["id"] for row in ROWS)}
    golds = {row["id"]: str(row["answer"]) for row in ROWS} | {"small": "0.000015"}
    assert answers == {name: golds[name] for name in answers}
    dropped = warm.refused(
        *(tmp_path / "dropped", *FILE, train, val.replace("path", "val_path")),
        "datamodule.on_overlap=drop",
        small=False,
    )
    assert "1 training prompts dropped" in dropped
    assert "prompts_per_epoch=8, but the data has only 7" in dropped


def test_a_run_trains_on_chats_and_nested_answers_of_packed_shards(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}+{i}"}], "reward": {"truth": 2 * i}}
        for i in range(1, 17)
    ]
    for number in (0, 1):
        lines = "\n".join(map(json.dumps, rows[number::2]))
        name = f"train-0000{number}-of-00002.jsonl.gz"
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    columns = ("data.question_column=prompt", "data.answer_column=reward.truth")
    output = warm.passed(
        *(tmp_path / "run", *FILE, *columns, f"data.path={tmp_path}/", "data.val_fraction=0.3"),
        "data.template.user_suffix=' = ?'",
        small=False,
    )
    assert "data.template.system, user_prefix and user_suffix are not added" in output
    table = pyarrow.parquet.read_table(tmp_path / "run/rollouts/step_000000.parquet").to_pylist()
    tokenizer = load_tokenizer("tiny")
    for row in table:
        question = tokenizer.decode(row["prompt_ids"]).replace("<|user|>", "")
        assert question.replace("<|assistant|>", "") == row["question"]
        first, _, second = row["question"].partition("+")
        assert int(first) + int(second) == int(row["answer"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("data.template.arguments={enable_thinking: false}",), "arguments.enable_thinking does"),
        (("data.template.date=2025-01-01",), "data.template.date=2025-01-01 does nothing"),
        (("data.id_column=id", "data.answer_column=answr"), "did you mean 'answer'?"),
        (("data.val_fraction=0",), "data.val_path=FILE"),
        (("datamodule.prompts_per_epoch=64",), "prompts_per_epoch=64, but the data has only"),
    ],
)
def test_settings_of_the_data_that_do_not_fit_are_refused_before_anything_is_drawn(
    tmp_path: Path, settings: tuple[str, ...], named: str
) -> None:
    train = write(tmp_path / "train.jsonl", ROWS)
    told = warm.refused(
        tmp_path / "run", *FILE, train, "data.val_fraction=0.3", *settings, small=False
    )
    assert named in told
    assert not (tmp_path / "run/rollouts").exists()
