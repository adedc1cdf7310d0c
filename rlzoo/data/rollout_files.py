"""Rollout steps as parquet files: written for people and for `replay=`, read back to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from transformers import PreTrainedTokenizerBase

from rlzoo.errors import UserError
from rlzoo.rewards.base import Verdict
from rlzoo.selection import correct
from rlzoo.types import Prompt, Rollouts

TOKENS = {  # columns that a replay needs and a reader does not
    "prompt_ids": pyarrow.list_(pyarrow.int32()),
    "response_ids": pyarrow.list_(pyarrow.int32()),
    "sampler_logprobs": pyarrow.list_(pyarrow.float32()),
}


def write_rollouts(path: Path, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> None:
    """One row per rollout, in order."""
    prompts = [rollouts.prompts[g] for g in rollouts.group_ids.tolist()]
    columns = {
        "rollout_step": [rollouts.rollout_step] * len(rollouts),
        "policy_version": [rollouts.policy_version] * len(rollouts),
        "prompt_id": [prompt.id for prompt in prompts],
        "question": [prompt.question for prompt in prompts],
        "answer": [prompt.answer for prompt in prompts],
        "response": [tokenizer.decode(r) for r in rollouts.responses],
        "reward": rollouts.rewards.tolist(),
        "verdict": [Verdict(v).name.lower() for v in rollouts.verdicts.tolist()],
        "length": rollouts.lengths.tolist(),
        "truncated": rollouts.truncated.tolist(),
    }
    tokens = (
        [list(prompt.token_ids) for prompt in prompts],
        [response.tolist() for response in rollouts.responses],
        [logprobs.tolist() for logprobs in rollouts.sampler_logprobs],
    )
    for (name, kind), values in zip(TOKENS.items(), tokens, strict=True):
        columns[name] = pyarrow.array(values, type=kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def read_rollouts(path: Path, rollout_step: int) -> Rollouts:
    """The rollouts of a file that `write_rollouts` made, as those of this run's `rollout_step`.

    Raises:
        UserError: no such columns.
    """
    table = pyarrow.parquet.read_table(path)
    missing = [name for name in (*TOKENS, "reward", "prompt_id") if name not in table.column_names]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}, so it cannot be replayed. Give a file that"
            " a run of this version wrote to its rollouts/."
        )
    rows = table.to_pylist()
    for row in rows:
        if row["reward"] is None or not math.isfinite(row["reward"]):
            raise UserError(
                f"{path} gives a response to prompt {row['prompt_id']} the reward {row['reward']},"
                " which would make every weight NaN. Give a file as a run wrote it."
            )
    first = {row["prompt_id"]: row for row in reversed(rows)}
    ids = list(dict.fromkeys(row["prompt_id"] for row in rows))
    return Rollouts(
        prompts=[
            Prompt(i, first[i]["question"], first[i]["answer"], token_ids=tuple(first[i]["prompt_ids"]))
            for i in ids
        ],
        group_ids=torch.tensor([ids.index(row["prompt_id"]) for row in rows], dtype=torch.long),
        responses=[torch.tensor(row["response_ids"]) for row in rows],
        sampler_logprobs=[torch.tensor(row["sampler_logprobs"]) for row in rows],
        truncated=torch.tensor([row["truncated"] for row in rows]),
        rewards=torch.tensor([row["reward"] for row in rows], dtype=torch.float32),
        verdicts=torch.tensor(
            [Verdict[row["verdict"].upper()] for row in rows], dtype=torch.int8
        ),
        policy_version=rows[0]["policy_version"] if rows else 0,
        rollout_step=rollout_step,
        replayed=True,
    )


def rollout_files(path: str, key: str) -> list[Path]:
    """The files of a run's rollouts/ in order, or the one file named.

    Raises:
        UserError: there is none.
    """
    place = Path(path)
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise UserError(
            f"{key}={path} is neither a parquet file nor a folder of them. Give the rollouts/ of a"
            " run, or one file in it."
        )
    return files


def accepted(path: str, key: str) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(prompt, response) token ids of every right rollout in a run's files.

    Raises:
        UserError: there is none.
    """
    pairs = []
    for file in rollout_files(path, key):
        rollouts = read_rollouts(file, 0)
        for i in correct(rollouts.rewards).nonzero()[:, 0].tolist():
            prompt = rollouts.prompts[int(rollouts.group_ids[i])]
            pairs.append((prompt.token_ids, tuple(rollouts.responses[i].tolist())))
    if not pairs:
        raise UserError(f"{key}={path} holds no right response to learn from.")
    return pairs
