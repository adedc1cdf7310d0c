"""Supervised training: solutions or accepted rollouts in length-sorted batches, by an ordinary
loader."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlzoo.data.base import RunDataModule
from rlzoo.data.prompts import PromptSource
from rlzoo.data.rollout_files import accepted
from rlzoo.distributed import world
from rlzoo.errors import UserError
from rlzoo.ledger import Limits
from rlzoo.microbatching import Plan, collate
from rlzoo.models.limits import check_examples, limits_of
from rlzoo.progress import Bars
from rlzoo.rng import derive_seed
from rlzoo.types import Prompt, RolloutBatch, Rollouts
from rlzoo.values import AtLeast1, PathText, Seed

Pair = tuple[str, str] | tuple[Sequence[int], Sequence[int]]  # question and solution, or token ids

POOL = 16  # batches sorted by length together, so that little is padding


class SFTDataModule(RunDataModule):
    """Batches of (question, solution) pairs for `algo=sft`.

    Args:
        source: gives the template, the validation prompts and, without a corpus, the examples:
            the worked solutions of its train split.
        tokenizer: encodes both; solutions end with its end-of-sequence token.
        bars, limits: see RunDataModule.
        corpus: (question, solution) pairs by index, instead of the train split.
        rollouts: a run's rollouts/, or a file in it: trains on its right responses instead.
        batch_size: examples per update.
        updates_per_step: updates between two boundaries (log, checkpoint).
        max_prompt_tokens: limit of prompts.
        seed: of the order.

    Raises:
        UserError: sizes below 1, or prompts without solutions.
    """

    def __init__(
        self,
        source: PromptSource,
        tokenizer: PreTrainedTokenizerBase,
        bars: Bars,
        limits: Limits,
        *,
        corpus: Sequence[tuple[str, str]] | None = None,
        rollouts: PathText | None = None,
        batch_size: AtLeast1 = 128,
        updates_per_step: AtLeast1 = 100,
        max_prompt_tokens: AtLeast1 = 256,
        seed: Seed = 0,
    ) -> None:
        super().__init__(bars, limits)
        for key, value in {"batch_size": batch_size, "updates_per_step": updates_per_step}.items():
            if value < 1:
                raise UserError(f"datamodule.{key} must be at least 1, got {value}.")
        if corpus is not None and rollouts is not None:
            raise UserError("datamodule.corpus and datamodule.rollouts are both given: choose one.")
        if rollouts is not None:
            corpus = accepted(rollouts, "datamodule.rollouts", tokenizer)
        self.source, self.tokenizer, self.corpus = source, tokenizer, corpus
        self.batch_size, self.updates_per_step = batch_size, updates_per_step
        self.max_prompt_tokens, self.seed = max_prompt_tokens, seed
        self.val_batches: list[RolloutBatch] = []

    def setup(self, stage: str) -> None:
        if self.corpus is None:
            self.corpus = solved(self.source.load("train"))
        pairs = solved(self.source.load("val"))
        size = self.batch_size
        self.val_batches = [self.batch(pairs[i : i + size]) for i in range(0, len(pairs), size)]

    def encode(self, pairs: Sequence[Pair]) -> tuple[list[Prompt], list[Tensor]]:
        """Prompts and responses as token ids; those of recorded rollouts are never encoded anew."""
        if not isinstance(pairs[0][0], str):
            prompts = [Prompt(str(i), "", "", token_ids=p) for i, (p, _) in enumerate(pairs)]
            return prompts, [torch.tensor(response) for _, response in pairs]
        prompts = [Prompt(str(i), question, "") for i, (question, _) in enumerate(pairs)]
        prompts = self.source.template.encode(prompts, self.tokenizer, self.max_prompt_tokens)
        texts = [solution for _, solution in pairs]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return prompts, [torch.tensor([*x, self.tokenizer.eos_token_id]) for x in ids]

    def batch(self, pairs: Sequence[Pair], rank: int = 0, world_size: int = 1) -> RolloutBatch:
        """A microbatch in which every response token weighs 1; a rank takes its share of the rows,
        and the divisor counts all."""
        prompts, responses = self.encode(pairs)
        check_examples(limits_of(self.tokenizer), prompts, responses)
        num = len(pairs)
        rollouts = Rollouts(
            prompts=prompts,
            group_ids=torch.arange(num),
            responses=responses,
            sampler_logprobs=[torch.zeros(len(r)) for r in responses],
            truncated=torch.zeros(num, dtype=torch.bool),
            rewards=torch.zeros(num),
            verdicts=torch.zeros(num, dtype=torch.int8),
            policy_version=0,
            rollout_step=0,
        )
        rows = list(range(rank, num, world_size))
        plan = Plan(rows, torch.ones(len(rows)), float(rollouts.lengths.sum()))
        return collate(rollouts, plan, self.tokenizer.pad_token_id)

    def batches(self) -> Iterator[RolloutBatch]:
        """The microbatches of one step, from where the run stands; the corpus wraps."""
        num, size = self.batch_size * POOL, self.microbatches_per_step
        first = self.rollout_step * size
        self.rollout_step += 1
        for index in range(first, first + size):
            pool, place = divmod(index, POOL)
            if place == 0 or index == first:
                chosen = sorted(
                    (self.corpus[i % len(self.corpus)] for i in range(pool * num, (pool + 1) * num)),
                    key=lambda pair: len(pair[0]) + len(pair[1]),
                )
                order = list(range(POOL))
                random.Random(derive_seed(self.seed, "sft", pool)).shuffle(order)
            start = order[place] * self.batch_size
            batch = self.batch(chosen[start : start + self.batch_size], *world())
            batch.last = index + 1 == first + size
            yield batch

    @property
    def microbatches_per_step(self) -> int:
        return self.updates_per_step * self.trainer.accumulate_grad_batches

    def train_dataloader(self) -> SFTLoader:
        return SFTLoader(self)

    def state_dict(self) -> dict:
        return {"rollout_step": self.rollout_step, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.rollout_step = state["rollout_step"]
        self.ledger.load_state_dict(state["ledger"])


class SFTLoader:
    """One step of batches per Lightning epoch."""

    def __init__(self, data: SFTDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.microbatches_per_step

    def __iter__(self) -> Iterator[RolloutBatch]:
        return self.data.batches()


def solved(prompts: list[Prompt]) -> list[tuple[str, str]]:
    """(question, solution) of every prompt.

    Raises:
        UserError: a prompt has no worked solution, or is a chat.
    """
    for prompt in prompts:
        if prompt.turns is not None:
            raise UserError(
                f"algo=sft takes plain questions, but prompt {prompt.id} is a chat. Name the turn"
                " that asks, such as data.question_column=messages.0.content."
            )
        if prompt.solution is None:
            raise UserError(
                f"algo=sft needs worked solutions, but prompt {prompt.id} has none. Set"
                " data.solution_column, or give datamodule.corpus."
            )
    return [(prompt.question, prompt.solution) for prompt in prompts]
