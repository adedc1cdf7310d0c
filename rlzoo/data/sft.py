"""Supervised training: solutions or accepted rollouts in length-sorted batches, by an ordinary
loader."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlzoo.data import fingerprint
from rlzoo.data.leaks import tell_shared
from rlzoo.data.prompts import PromptSource
from rlzoo.data.rollout_files import accepted
from rlzoo.errors import UserError
from rlzoo.learning.microbatching import in_bins, size_of
from rlzoo.models.limits import check_example, limits_of
from rlzoo.ranks.exchange import world
from rlzoo.report.ledger import Limits
from rlzoo.rng import derive_seed
from rlzoo.types import BatchRow, Prompt, RolloutBatch, Update, collate
from rlzoo.values import AtLeast1, PathText, Seed

Pair = tuple[str, str] | tuple[Sequence[int], Sequence[int]]  # question and solution, or token ids

log = logging.getLogger(__name__)

ANY_LENGTH = 2**31  # tokens; limits are looked at by `fitting`
CHUNK = 4096  # examples measured at once
POOL = 16  # updates sorted by length together, so that little is padding


class SFTDataModule(lightning.LightningDataModule):
    """Batches of (question, solution) pairs for `algo=sft`.

    Args:
        source: gives the template, the validation prompts and, without a corpus, the examples:
            the worked solutions of its train split.
        tokenizer: encodes both; solutions end with its end-of-sequence token.
        corpus: (question, solution) pairs by index, instead of the train split.
        rollouts: a run's rollouts/, or a file in it: trains on its right responses instead.
        batch_size: examples per update, over all ranks.
        updates_per_step: updates between two boundaries (log, checkpoint).
        max_prompt_tokens: limit of prompts.
        max_response_tokens: limit of solutions, their end-of-sequence token included.
        on_too_long: "error" or "drop" (with a count) for longer examples.
        seed: of the order.

    Attributes:
        loader: what Lightning trains on; the loop makes it.
        rollout_step: blocks of `updates_per_step` updates begun in the run.

    Raises:
        UserError: two corpora, prompts without solutions, examples over the limits.
    """

    def __init__(
        self,
        source: PromptSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        corpus: Sequence[tuple[str, str]] | None = None,
        rollouts: PathText | None = None,
        batch_size: AtLeast1 = 128,
        updates_per_step: AtLeast1 = 100,
        max_prompt_tokens: AtLeast1 = 256,
        max_response_tokens: AtLeast1 = 512,
        on_too_long: Literal["error", "drop"] = "error",
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        if corpus is not None and rollouts is not None:
            raise UserError("datamodule.corpus and datamodule.rollouts are both given: choose one.")
        self.source, self.tokenizer = source, tokenizer
        self.corpus: Sequence[Pair] = () if corpus is None else corpus
        if rollouts is not None:
            self.corpus = accepted(rollouts, "datamodule.rollouts", tokenizer)
        self.trains_on_split = corpus is None and rollouts is None  # which is loaded later
        self.batch_size, self.updates_per_step = batch_size, updates_per_step
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.on_too_long, self.seed = on_too_long, seed
        self._pool: tuple[int, list[Pair]] = (-1, [])  # its number, and its examples by length
        self.val_pairs: Sequence[Pair] = ()
        self._validation: list[RolloutBatch] = []  # made at the first
        self.loader: Iterable[Update] = ()
        self.rollout_step, self.exact = 0, True
        self._fingerprint: dict[str, Any] = {}  # computed once

    def check_limits(self, limits: Limits) -> None:
        """Raises a UserError where no limit would ever end the run; says if one is overshot."""
        most, step = limits.max_updates, self.updates_per_step
        if most is not None and most % step:
            log.warning(
                f"limits.max_updates={most} is no multiple of datamodule.updates_per_step={step},"
                f" and limits are looked at between steps: it makes {-(-most // step) * step}"
                " updates."
            )
        if limits.max_updates is None and limits.max_seconds is None:
            raise UserError(
                "algo=sft draws no responses, so limits.max_responses and limits.max_tokens never"
                " end it. Set limits.max_updates or limits.max_seconds."
            )

    def setup(self, stage: str) -> None:
        if self.trains_on_split:
            self.corpus = solved(self.source.load("train"))
        self.corpus, trained = self.fitting(self.corpus, "the corpus")
        if len(self.corpus) < self.batch_size:
            log.warning(
                f"The corpus has {len(self.corpus)} examples, fewer than"
                f" datamodule.batch_size={self.batch_size}: a batch holds some more than once."
            )
        prompts = self.source.load("val")
        written = [prompt for prompt in prompts if (prompt.solution or "").strip()]
        if len(written) < len(prompts):
            log.warning(
                f"{len(prompts) - len(written)} of {len(prompts)} validation prompts have no worked"
                " solution: val/loss is of the others."
            )
        held_out: set[int] = set()
        if written:
            self.val_pairs, held_out = self.fitting(solved(written), "the validation split")
        tell_shared(trained, held_out)

    def fitting(self, pairs: Sequence[Pair], what: str) -> tuple[Sequence[Pair], set[int]]:
        """The examples within the limits of length, and hashes of their prompts' token ids.

        A corpus that is made as it is asked for is sampled, unless examples are to be dropped.

        Raises:
            UserError: an empty solution; a longer example, unless it is to be dropped; none left.
        """
        kept, dropped, hashes = [], 0, set()
        step = fingerprint.stride(pairs) if self.on_too_long == "error" else 1
        looked_at = range(0, len(pairs), step)
        for start in range(0, len(looked_at), CHUNK):
            indices = looked_at[start : start + CHUNK]
            chunk = [pairs[i] for i in indices]
            prompts, responses = self.encode(chunk)
            for i, pair, prompt, response in zip(indices, chunk, prompts, responses, strict=True):
                written = pair[1]
                if not (written.strip() if isinstance(written, str) else written):
                    raise UserError(f"Example {i} of {what} has an empty solution. Leave it out.")
                reason = self.too_long(len(prompt.token_ids), len(response))
                if reason is None:
                    check_example(limits_of(self.tokenizer), prompt, response)
                    kept.append(i)
                    hashes.add(hash(tuple(prompt.token_ids)))
                elif self.on_too_long == "error":
                    raise UserError(
                        f"Example {i} of {what} has {reason}. Raise the limit, or leave such"
                        " examples out with datamodule.on_too_long=drop."
                    )
                else:
                    dropped += 1
        if dropped:
            log.warning(f"{dropped} of {len(pairs)} examples of {what} dropped: too long.")
        if not kept:
            raise UserError(
                f"No example of {what} is left: {len(pairs)} given, {dropped} over the limits"
                f" datamodule.max_prompt_tokens={self.max_prompt_tokens} or"
                f" max_response_tokens={self.max_response_tokens}. Raise them, or give other data."
            )
        return [pairs[i] for i in kept] if dropped else pairs, hashes

    def too_long(self, prompt: int, response: int) -> str | None:
        """What of an example of so many tokens is over its limit."""
        if prompt > self.max_prompt_tokens:
            limit = f"datamodule.max_prompt_tokens={self.max_prompt_tokens}"
            return f"{prompt} prompt tokens, over {limit}"
        if response > self.max_response_tokens:
            limit = f"datamodule.max_response_tokens={self.max_response_tokens}"
            return f"a solution of {response} tokens, over {limit}"
        return None

    def encode(self, pairs: Sequence[Pair]) -> tuple[list[Prompt], list[Tensor]]:
        """Prompts and responses as token ids; those of recorded rollouts are never encoded anew."""
        if not isinstance(pairs[0][0], str):
            ids = [tuple(int(token) for token in prompt) for prompt, _ in pairs]
            prompts = [Prompt(str(i), "", "", token_ids=p) for i, p in enumerate(ids)]
            return prompts, [torch.tensor(response) for _, response in pairs]
        prompts = [Prompt(str(i), str(question), "") for i, (question, _) in enumerate(pairs)]
        prompts = self.source.template.encode(prompts, self.tokenizer, ANY_LENGTH)
        texts = [solution for _, solution in pairs]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return prompts, [torch.tensor([*x, self.tokenizer.eos_token_id]) for x in ids]

    def update(
        self,
        pairs: Sequence[Pair],
        budget: int,
        padded: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> Update:
        """An optimizer step on some examples, a rank's share of them in microbatches; the divisor
        counts the tokens of all, so that the gradient is one mean over them.

        Args:
            budget, padded: see `rlzoo.learning.microbatching.in_bins`.
        """
        prompts, responses = self.encode(pairs)
        rows = [
            BatchRow(prompt.token_ids, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        for row in rows:  # not all of a corpus was looked at
            if reason := self.too_long(len(row.prompt_ids), len(row.response_ids)):
                raise UserError(f"An example of the corpus has {reason}. Raise the limit.")
        divisor = float(sum(len(row.response_ids) for row in rows))
        sizes = [size_of([len(row.prompt_ids) + len(row.response_ids)]) for row in rows]
        parts = in_bins(sizes, world_size, budget, padded)[rank]
        pad = self.tokenizer.pad_token_id
        return Update([collate([rows[i] for i in part], pad, divisor) for part in parts])

    def updates(self, budget: int, padded: bool) -> Iterator[Update]:
        """This rank's part of each update of the next block; the corpus wraps."""
        first = self.rollout_step * self.updates_per_step
        self.rollout_step += 1
        for place in range(self.updates_per_step):
            update = self.update(self.examples(first + place), budget, padded, *world())
            update.place, update.last = place, place == self.updates_per_step - 1
            yield update

    def validation(self, budget: int, padded: bool) -> list[RolloutBatch]:
        """This rank's microbatches of the validation examples."""
        if not self._validation and self.val_pairs:
            batches = range(0, len(self.val_pairs), self.batch_size)
            self._validation = [
                batch
                for start in batches
                for batch in self.update(
                    self.val_pairs[start : start + self.batch_size], budget, padded, *world()
                ).microbatches
            ]
        return self._validation

    def examples(self, index: int) -> list[Pair]:
        """The examples of a run's update: alike in length, in a seeded order of pools."""
        pool, place = divmod(index, POOL)
        if self._pool[0] != pool:
            num = self.batch_size * POOL
            chosen = (
                self.corpus[i % len(self.corpus)] for i in range(pool * num, (pool + 1) * num)
            )
            self._pool = pool, sorted(chosen, key=lambda pair: len(pair[0]) + len(pair[1]))
        order = list(range(POOL))
        random.Random(derive_seed(self.seed, "sft", pool)).shuffle(order)
        start = order[place] * self.batch_size
        return self._pool[1][start : start + self.batch_size]

    @property
    def epochs_done(self) -> int:
        return self.rollout_step

    def exhausted(self) -> str | None:
        return None  # the corpus wraps

    def train_dataloader(self) -> Iterable[Update]:
        return self.loader

    def state_dict(self) -> dict[str, Any]:
        return {"rollout_step": self.rollout_step, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if before := state.get("fingerprint"):  # older checkpoints have none
            fingerprint.refuse(self.changes(before, self.fingerprint()))
        self.rollout_step = state["rollout_step"]

    def fingerprint(self) -> dict[str, Any]:
        if not self._fingerprint:
            first, _ = self.encode([self.corpus[i] for i in range(min(8, len(self.corpus)))])
            self._fingerprint = {
                "corpus": fingerprint.of_pairs(self.corpus),
                "rendered": fingerprint.of_prompts(first)["tokens"],
            }
        return self._fingerprint

    def changes(self, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """In what two fingerprints differ, that must not."""
        found = []
        if before["corpus"]["count"] != now["corpus"]["count"]:
            counts = before["corpus"]["count"], now["corpus"]["count"]
            found.append(f"there were {counts[0]:,} examples, now there are {counts[1]:,}")
        elif before["corpus"] != now["corpus"]:
            found.append("some examples are others, or stand in another order")
        elif before["rendered"] != now["rendered"]:
            found.append(
                "the examples are rendered to other tokens (another tokenizer, chat template, or"
                " data.template)"
            )
        return found


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
        if not (prompt.solution or "").strip():
            raise UserError(
                f"algo=sft needs worked solutions, but prompt {prompt.id} has none. Set"
                " data.solution_column, or give datamodule.corpus."
            )
    return [(prompt.question, prompt.solution or "") for prompt in prompts]
