import dataclasses
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from rlzoo.data.rollout_files import accepted, read_rollouts, rollout_files, write_rollouts
from rlzoo.errors import UserError
from rlzoo.models.policy import load_tokenizer
from rlzoo.rewards.math import Verdict
from rlzoo.types import Rollouts
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
        assert all(torch.equal(ours, theirs) and ours.dtype == theirs.dtype for ours, theirs in pairs)
    for name in ("group_ids", "truncated", "rewards", "verdicts"):
        ours, theirs = getattr(read, name), getattr(written, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert read.prompts == written.prompts
    assert (read.rollout_step, read.policy_version, read.replayed) == (5, 0, True)


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
