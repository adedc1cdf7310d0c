"""Rollout steps as parquet files: written for people and for `replay=`, read back to the bit."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlzoo.errors import UserError
from rlzoo.learning.selection import correct
from rlzoo.rewards.base import Verdict
from rlzoo.types import Prompt, Rollouts

TOKENS = {  # columns that a replay needs and a reader does not
    "prompt_ids": pyarrow.list_(pyarrow.int32()),
    "response_ids": pyarrow.list_(pyarrow.int32()),
    "sampler_logprobs": pyarrow.list_(pyarrow.float32()),
}

NEEDED = (  # by a replay
    *TOKENS,
    *("prompt_id", "question", "answer", "response", "reward", "verdict", "truncated"),
    "policy_version",
)
STEP_FILE = re.compile(r"step_(\d{6,})\.parquet")  # as a run names them
NUM_DECODED = 16  # responses of a file that are decoded, to tell whose tokens they are


class RolloutWriter:
    """Writes files of rollouts from a thread, one at a time, while the run goes on."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlzoo-rollouts")
        self._writing: Future[None] | None = None

    def write(self, path: Path, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> None:
        """Begins to write a file, once the one before it is there."""
        self.wait()
        self._writing = self._executor.submit(write_rollouts, path, rollouts, tokenizer)

    def wait(self) -> None:
        """Returns once the file begun last is whole; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def write_rollouts(path: Path, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> None:
    """One row per rollout, in order. The file is whole or absent: written aside, and renamed."""
    prompts, groups = rollouts.prompts, pyarrow.array(rollouts.group_ids.numpy())

    def of_prompt(values: list[Any], kind: pyarrow.DataType) -> pyarrow.Array:
        return pyarrow.array(values, kind).take(groups)

    columns = {
        "rollout_step": [rollouts.rollout_step] * len(rollouts),
        "policy_version": [rollouts.policy_version] * len(rollouts),
        "prompt_id": of_prompt([prompt.id for prompt in prompts], pyarrow.string()),
        "question": of_prompt([prompt.question for prompt in prompts], pyarrow.string()),
        "answer": of_prompt([prompt.answer for prompt in prompts], pyarrow.string()),
        "response": [tokenizer.decode(r) for r in rollouts.responses],
        "reward": rollouts.rewards.tolist(),
        "verdict": [Verdict(v).name.lower() for v in rollouts.verdicts.tolist()],
        "length": rollouts.lengths.tolist(),
        "truncated": rollouts.truncated.tolist(),
        "prompt_ids": of_prompt([p.token_ids for p in prompts], TOKENS["prompt_ids"]),
        "response_ids": lists(rollouts.responses, torch.int32),
        "sampler_logprobs": lists(rollouts.sampler_logprobs, torch.float32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), aside)
    except OSError:
        aside.unlink(missing_ok=True)  # on a full disk, half a file takes the last room
        raise
    os.replace(aside, path)


def lists(rows: Sequence[Tensor], dtype: torch.dtype) -> pyarrow.ListArray:
    """Rows of numbers as a column of lists, without a Python object for each number."""
    offsets = [0, *itertools.accumulate(map(len, rows))]
    values = torch.cat([torch.zeros(0, dtype=dtype), *(row.to(dtype) for row in rows)])
    return pyarrow.ListArray.from_arrays(
        pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(values.numpy())
    )


def read_rollouts(
    path: Path, rollout_step: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Rollouts:
    """The rollouts of a file that `write_rollouts` made, as those of this run's `rollout_step`.

    Args:
        tokenizer: of the policy; None does not ask whether the tokens are of its vocabulary.

    Raises:
        UserError: not such a file, or one of another tokenizer.
    """
    rows = read_table(path)
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows, start=1):
        problem = wrong_with(row, prompts)
        if problem:
            raise UserError(
                f"{path}, row {number}: {problem}. Give a file as a run wrote it to its rollouts/."
            )
        id_ = row["prompt_id"]
        if id_ not in prompts:
            token_ids = tuple(row["prompt_ids"])
            prompts[id_] = Prompt(id_, row["question"], row["answer"], token_ids=token_ids)
    if tokenizer is not None:
        check_tokens(path, rows, tokenizer)
    place = {id_: index for index, id_ in enumerate(prompts)}
    return Rollouts(
        prompts=list(prompts.values()),
        group_ids=torch.tensor([place[row["prompt_id"]] for row in rows], dtype=torch.long),
        responses=[torch.tensor(row["response_ids"], dtype=torch.long) for row in rows],
        sampler_logprobs=[torch.tensor(row["sampler_logprobs"]) for row in rows],
        truncated=torch.tensor([row["truncated"] for row in rows], dtype=torch.bool),
        rewards=torch.tensor([row["reward"] for row in rows], dtype=torch.float32),
        verdicts=torch.tensor([Verdict[row["verdict"].upper()] for row in rows], dtype=torch.int8),
        policy_version=rows[0]["policy_version"] if rows else 0,
        rollout_step=rollout_step,
        replayed=True,
    )


def read_table(path: Path) -> list[dict[str, Any]]:
    check_columns(path)
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, columns=[*NEEDED]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    return rows


def check_columns(path: Path) -> None:
    """Raises a UserError unless a file has what a replay needs; reads its footer alone."""
    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}, so it cannot be replayed. Give a file that"
            " a run of this version wrote to its rollouts/."
        )


def unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is no readable parquet file ({error}), so it cannot be replayed. Take it out of"
        " its folder, or put a whole one there."
    )


def wrong_with(row: dict[str, Any], prompts: dict[str, Prompt]) -> str | None:
    """What a run cannot have written, given the prompts of the rows before."""
    nulls = [name for name in NEEDED if row[name] is None]
    if nulls:
        return f"{nulls[0]} is null"
    ids, logprobs = row["response_ids"], row["sampler_logprobs"]
    if not math.isfinite(row["reward"]):
        return f"the reward is {row['reward']}, which would make every weight NaN"
    if len(ids) != len(logprobs):
        return f"there are {len(logprobs)} log-probs for {len(ids)} tokens"
    if not all(value is not None and math.isfinite(value) for value in logprobs):
        return "a log-prob is not finite, which would make every ratio NaN"
    if None in ids or None in row["prompt_ids"] or min([*ids, *row["prompt_ids"]], default=0) < 0:
        return "a token id is null or negative"
    if row["verdict"].upper() not in Verdict.__members__:
        return f"the verdict is {row['verdict']!r}"
    other = prompts.get(row["prompt_id"])
    if other and (other.token_ids, other.answer) != (tuple(row["prompt_ids"]), row["answer"]):
        return f"prompt {row['prompt_id']!r} has other tokens or another answer than further up"
    return None


def check_tokens(
    path: Path, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises a UserError if a tokenizer does not read the tokens as the text beside them."""
    for row in rows[:: max(1, len(rows) // NUM_DECODED)]:
        text = tokenizer.decode(row["response_ids"])
        if text != row["response"]:
            raise UserError(
                f"{path} was written with another tokenizer than model.path has: its tokens of"
                f" {row['response'][:40]!r} read {text[:40]!r}. Give rollouts of the same model."
            )


def rollout_files(path: str, key: str) -> list[Path]:
    """The files of a run's rollouts/ in the order of their steps, or the one file named.

    Other files beside step_000000.parquet and its like are left alone.

    Raises:
        UserError: there is none, or one is not such a file.
    """
    place = Path(path).expanduser()
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    steps = [(int(match[1]), file) for file in files if (match := STEP_FILE.fullmatch(file.name))]
    if place.is_dir() and steps:
        files = [file for _, file in sorted(steps)]
    if not files or not files[0].is_file():
        raise UserError(
            f"{key}={path} is neither a parquet file nor a folder of them. Give the rollouts/ of a"
            " run, or one file in it."
        )
    for file in files:  # at start-up, and not when their turn comes
        check_columns(file)
    return files


def accepted(
    path: str, key: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(prompt, response) token ids of every right rollout in a run's files.

    Raises:
        UserError: there is none.
    """
    pairs: list[tuple[Sequence[int], Sequence[int]]] = []
    for file in rollout_files(path, key):
        rollouts = read_rollouts(file, 0, tokenizer)
        for i in correct(rollouts.rewards).nonzero()[:, 0].tolist():
            prompt = rollouts.prompts[int(rollouts.group_ids[i])]
            pairs.append((prompt.token_ids, tuple(rollouts.responses[i].tolist())))
    if not pairs:
        raise UserError(f"{key}={path} holds no right response to learn from.")
    return pairs
