import dataclasses
import errno
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from rlzoo.callbacks.checkpoint import Checkpoint
from rlzoo.data import rollout_files as rollout_files_module
from rlzoo.data.rollout_files import (
    TOKENS,
    RolloutWriter,
    accepted,
    read_rollouts,
    rollout_files,
    write_rollouts,
)
from rlzoo.errors import UserError
from rlzoo.models.policy import load_tokenizer
from rlzoo.rewards.base import Verdict
from rlzoo.types import Rollouts
from tests import warm
from tests.recorded import recorded_rollouts

TOKENIZER = load_tokenizer("tiny")


def recorded() -> Rollouts:
    rollouts = recorded_rollouts((3, 1, 4))
    generator = torch.Generator().manual_seed(1)
    logprobs = [-torch.rand(len(r), generator=generator) for r in rollouts.responses]
    right, wrong, unknown = Verdict.RIGHT, Verdict.WRONG, Verdict.UNVERIFIABLE
    verdicts = torch.tensor([right if r else wrong for r in rollouts.rewards], dtype=torch.int8)
    verdicts[0] = unknown
    truncated = torch.arange(8) % 3 == 0
    return dataclasses.replace(
        rollouts, sampler_logprobs=logprobs, verdicts=verdicts, truncated=truncated
    )


def test_recorded_rollouts_are_read_back_to_the_bit(tmp_path):
    written = recorded()
    write_rollouts(tmp_path / "step.parquet", written, TOKENIZER)
    read = read_rollouts(tmp_path / "step.parquet", rollout_step=5)
    for name in ("responses", "sampler_logprobs"):
        pairs = zip(getattr(read, name), getattr(written, name), strict=True)
        assert all(
            torch.equal(ours, theirs) and ours.dtype == theirs.dtype for ours, theirs in pairs
        )
    for name in ("group_ids", "truncated", "rewards", "verdicts"):
        ours, theirs = getattr(read, name), getattr(written, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert read.prompts == written.prompts
    assert (read.rollout_step, read.policy_version, read.replayed) == (5, 0, True)


def test_the_columns_are_those_of_lists_made_row_by_row(tmp_path):
    written = recorded()
    write_rollouts(tmp_path / "step.parquet", written, TOKENIZER)
    table = pyarrow.parquet.read_table(tmp_path / "step.parquet")
    prompts = [written.prompts[g] for g in written.group_ids.tolist()]
    assert table["prompt_ids"].to_pylist() == [list(prompt.token_ids) for prompt in prompts]
    assert table["question"].to_pylist() == [prompt.question for prompt in prompts]
    assert table["response_ids"].to_pylist() == [r.tolist() for r in written.responses]
    assert table["sampler_logprobs"].to_pylist() == [r.tolist() for r in written.sampler_logprobs]
    assert table["response"].to_pylist() == [TOKENIZER.decode(r) for r in written.responses]
    assert {name: table.schema.field(name).type for name in TOKENS} == TOKENS


def test_a_file_that_cannot_be_finished_is_not_there_and_says_so(tmp_path, monkeypatch):
    def half(table: object, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", half)
    writer = RolloutWriter()
    writer.write(tmp_path / "step.parquet", recorded(), TOKENIZER)
    with pytest.raises(OSError, match="No space left"):
        writer.write(tmp_path / "next.parquet", recorded(), TOKENIZER)
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_before_a_checkpoint_that_claims_it(tmp_path, monkeypatch):
    whole = rollout_files_module.write_rollouts

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        whole(*arguments)

    there, publish = [], Checkpoint.publish

    def look(checkpoint: Checkpoint, partial: Path) -> None:
        there.append(sorted(p.name for p in (checkpoint.folder.parent / "rollouts").iterdir()))
        publish(checkpoint, partial)

    monkeypatch.setattr(rollout_files_module, "write_rollouts", slowly)
    monkeypatch.setattr(Checkpoint, "publish", look)
    warm.passed(tmp_path / "run")
    assert there == [["step_000000.parquet"], ["step_000000.parquet", "step_000001.parquet"]]


def test_files_of_a_folder_come_in_the_order_of_their_steps(tmp_path):
    for step in (2, 10, 1):
        write_rollouts(tmp_path / f"step_{step:06d}.parquet", recorded(), TOKENIZER)
    assert [p.stem for p in rollout_files(str(tmp_path), "replay")] == [
        "step_000001",
        "step_000002",
        "step_000010",
    ]


def test_the_right_responses_alone_are_accepted_as_the_tokens_they_were(tmp_path):
    written = recorded()
    write_rollouts(tmp_path / "step.parquet", written, TOKENIZER)
    right = written.rewards.nonzero()[:, 0].tolist()
    assert 0 < len(right) < len(written)
    expected = [
        (written.prompts[int(written.group_ids[i])].token_ids, tuple(written.responses[i].tolist()))
        for i in right
    ]
    assert accepted(str(tmp_path), "datamodule.rollouts") == expected


def test_rollouts_without_a_right_response_or_without_tokens_are_named(tmp_path: Path):
    none_right = dataclasses.replace(recorded(), rewards=torch.zeros(8))
    write_rollouts(tmp_path / "step.parquet", none_right, TOKENIZER)
    with pytest.raises(UserError, match="datamodule.rollouts=.* holds no right response"):
        accepted(str(tmp_path), "datamodule.rollouts")
    table = pyarrow.parquet.read_table(tmp_path / "step.parquet").drop_columns(["response_ids"])
    pyarrow.parquet.write_table(table, tmp_path / "step.parquet")
    with pytest.raises(UserError, match="step.parquet has no column response_ids"):
        read_rollouts(tmp_path / "step.parquet", 0)


def test_files_of_ones_own_beside_the_steps_are_left_alone_and_steps_are_counted(tmp_path: Path):
    for name in ("step_1000000", "step_999999", "step_5", "mine", "step_000001_copy"):
        write_rollouts(tmp_path / f"{name}.parquet", recorded(), TOKENIZER)
    (tmp_path / "notes.parquet").write_text("notes")
    found = [path.stem for path in rollout_files(str(tmp_path), "replay")]
    assert found == ["step_999999", "step_1000000"]


def test_a_file_that_cannot_be_replayed_is_refused_at_start(tmp_path: Path):
    write_rollouts(tmp_path / "step_000000.parquet", recorded(), TOKENIZER)
    whole = (tmp_path / "step_000000.parquet").read_bytes()
    for data in (b"", b"PAR1", whole[:-20]):
        (tmp_path / "step_000001.parquet").write_bytes(data)
        with pytest.raises(UserError, match="step_000001.parquet is no readable parquet file"):
            rollout_files(str(tmp_path), "replay")
    for name in ("question", "answer", "truncated", "verdict", "policy_version", "prompt_id"):
        table = pyarrow.parquet.read_table(tmp_path / "step_000000.parquet").drop_columns([name])
        pyarrow.parquet.write_table(table, tmp_path / "step_000001.parquet")
        with pytest.raises(UserError, match=f"step_000001.parquet has no column {name}"):
            rollout_files(str(tmp_path), "replay")


FAULTS = [  # column, what the second row has there, what is said
    ("sampler_logprobs", lambda row: [*row["sampler_logprobs"][:-1], float("nan")], "not finite"),
    ("sampler_logprobs", lambda row: [*row["sampler_logprobs"], -1.0], "log-probs for"),
    ("response_ids", lambda row: [*row["response_ids"][:-1], None], "null or negative"),
    ("response_ids", lambda row: [*row["response_ids"][:-1], -1], "null or negative"),
    ("prompt_ids", lambda row: [*row["prompt_ids"], 5], "'p0' has other tokens or another answer"),
    ("answer", lambda row: "another", "'p0' has other tokens or another answer"),
    ("reward", lambda row: float("nan"), "every weight NaN"),
    ("verdict", lambda row: "perhaps", "the verdict is 'perhaps'"),
    ("truncated", lambda row: None, "truncated is null"),
]


@pytest.mark.parametrize(("column", "change", "named"), FAULTS)
def test_a_row_that_no_run_can_have_written_is_refused(tmp_path: Path, column, change, named):
    path = tmp_path / "step_000000.parquet"
    write_rollouts(path, recorded(), TOKENIZER)
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[1][column] = change(rows[1])
    schema = pyarrow.parquet.read_schema(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)
    with pytest.raises(UserError, match=f"row 2: .*{named}"):
        read_rollouts(path, 0)


def test_rollouts_of_another_tokenizer_are_refused(tmp_path: Path):
    path = tmp_path / "step_000000.parquet"
    write_rollouts(path, recorded(), TOKENIZER)
    assert len(read_rollouts(path, 0, TOKENIZER)) == 8
    table = pyarrow.parquet.read_table(path)
    column = pyarrow.array(["as another tokenizer reads them"] * 8)
    at = table.column_names.index("response")
    pyarrow.parquet.write_table(table.set_column(at, "response", column), path)
    with pytest.raises(UserError, match="another tokenizer than model.path has"):
        accepted(str(tmp_path), "datamodule.rollouts", TOKENIZER)


def test_an_empty_response_keeps_its_type(tmp_path: Path):
    written = recorded()
    written.responses[2], written.sampler_logprobs[2] = torch.zeros(0, dtype=int), torch.zeros(0)
    write_rollouts(tmp_path / "step.parquet", written, TOKENIZER)
    read = read_rollouts(tmp_path / "step.parquet", 0)
    assert read.responses[2].dtype == torch.long and read.lengths[2] == 0
