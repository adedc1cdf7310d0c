"""What a rollout step makes a model compute, counted: no clock can say on a busy machine that a
change computes padding again, or passes over the same tokens twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from rlzoo.bench._live import Live
from rlzoo.bench._random_policies import make_policy
from rlzoo.bench._slots import slots_counted
from rlzoo.models.logprobs import response_scores
from rlzoo.ranks.whereabouts import HERE
from rlzoo.types import BatchRow, collate
from tests import warm

STEP = ("limits.max_responses=16", "callbacks.doctor=null", "callbacks.validation=null")
LAYERS = 4  # of the tiny policy


def phase() -> str:
    return HERE.phases[-1] if HERE.phases else "between"


def step(folder: Path, *overrides: str) -> tuple[Counter[str], list[int], list[int]]:
    """One rollout step: what was counted; prompt and response tokens of each rollout."""
    with slots_counted(phase, Qwen2MLP) as counts:
        warm.passed(folder / "run", *STEP, *overrides)
    table = pyarrow.parquet.read_table(folder / "run/rollouts/step_000000.parquet")
    prompts = [len(ids) for ids in table["prompt_ids"].to_pylist()]
    return counts, prompts, table["length"].to_pylist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counter[str], list[int], list[int]]:
    return step(tmp_path_factory.mktemp("plain"))


def test_updates_and_old_log_probs_pass_over_each_real_token_once(plain):
    counts, prompts, responses = plain
    tokens = sum(prompts) + sum(responses)
    assert counts["slots/training"] == counts["slots/scoring"] == LAYERS * tokens
    assert counts["passes/training"] == LAYERS * 2  # updates, each in one microbatch
    assert counts["passes/scoring"] == LAYERS


def test_gradient_checkpointing_passes_twice_and_no_more(tmp_path):
    counts, prompts, responses = step(tmp_path, "model.gradient_checkpointing=true")
    assert counts["slots/training"] == 2 * LAYERS * (sum(prompts) + sum(responses))


def test_small_microbatches_pass_over_each_real_token_once(tmp_path, plain):
    counts, prompts, responses = step(tmp_path, "algo.tokens_per_microbatch=300")
    assert counts["slots/training"] == plain[0]["slots/training"]
    assert counts["passes/training"] > plain[0]["passes/training"]


def test_the_engine_reads_a_prompt_once_and_draws_few_tokens_that_nobody_needs(plain):
    counts, prompts, responses = plain
    groups = [prompts[i] for i in range(0, len(prompts), 4)]  # of four responses
    needed = len(groups) * max(groups) + sum(length - 1 for length in responses)
    assert counts["slots/sampling/train"] <= 1.3 * LAYERS * needed


def test_logits_of_all_tokens_never_stand_in_memory_whole():
    policy = make_policy("1m")
    rows = [BatchRow(range(5), torch.randint(4, 2000, (512,))) for _ in range(8)]
    with Live() as live:
        scores = response_scores(policy, collate(rows), 1.0)
        scores.logprobs.sum().backward()
    whole = 8 * 512 * policy.config.vocab_size * 4
    assert live.largest < whole / 2
