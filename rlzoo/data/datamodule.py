"""Prompts, their budgets, and the cursor: what is drawn from next."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from typing import Any, Literal

import lightning
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlzoo.allocators.base import Allocator
from rlzoo.allocators.uniform import Uniform
from rlzoo.data import fingerprint
from rlzoo.data.leaks import apart, check_alike
from rlzoo.data.prompts import PromptSource
from rlzoo.data.rollout_files import read_rollouts, rollout_files
from rlzoo.engines.base import SamplingParams
from rlzoo.errors import UserError
from rlzoo.models.limits import check_length, check_prompts, limits_of
from rlzoo.rng import derive_seed
from rlzoo.types import Prompt, Rollouts, Update
from rlzoo.values import AtLeast0, AtLeast1, PathText, Positive, Seed, ShareAbove0

log = logging.getLogger(__name__)


class RolloutDataModule(lightning.LightningDataModule):
    """The prompts of each rollout step, under budgets that a sampler sets, and the cursor.

    An epoch is a shard of `prompts_per_epoch` prompts, in a seeded order that wraps over the data
    set (what does not fill a shard sits out one pass). Its budgets sum to
    `prompts_per_epoch * responses_per_prompt`, which makes a fixed number of rollout steps.

    Args:
        source: prompts of each split (`data=`).
        tokenizer: renders prompts.
        allocator: the sampler's; kept here because its state is resumed with the budgets.
        seed: of the run.
        prompts_per_epoch: P, prompts between two plans of budgets.
        responses_per_prompt: mean budget.
        responses_per_step: responses drawn under one policy version, in whole groups.
        max_prompt_tokens, max_response_tokens: limits.
        on_too_long: "error" or "drop" for longer prompts.
        on_overlap: "warn", "drop" or "error" for training prompts that are rendered like one of
            validation.
        temperature: of sampling.
        top_p, top_k: truncate the distribution that is sampled from; 1 and 0 do not.
        allow_truncated_sampling: must be true for them: the trainer's log-probs are those of the
            whole distribution, so that ratios and gradients are biased.
        val_responses: responses per validation prompt, the k of avg@k.
        replay: a file or folder of recorded rollouts that are trained on instead of drawing.

    Attributes:
        loader: what Lightning trains on; the loop makes it.
        params: temperature and limits of sampling.
        rollout_step: rollout steps drawn in the run.
        epoch: the epoch being drawn, or the next one.
        budgets: of the epoch, by prompt id; None between epochs.
        exact: False where a resume starts the optimizer anew, so that more may differ.

    Raises:
        UserError: sizes that do not fit each other or the data.
    """

    def __init__(
        self,
        source: PromptSource,
        tokenizer: PreTrainedTokenizerBase,
        allocator: Allocator,
        *,
        seed: Seed = 0,
        prompts_per_epoch: AtLeast1 = 128,
        responses_per_prompt: AtLeast1 = 8,
        responses_per_step: AtLeast1 = 256,
        max_prompt_tokens: AtLeast1 = 256,
        max_response_tokens: AtLeast1 = 128,
        on_too_long: Literal["error", "drop"] = "error",
        on_overlap: Literal["warn", "drop", "error"] = "warn",
        temperature: Positive = 1.0,
        top_p: ShareAbove0 = 1.0,
        top_k: AtLeast0 = 0,
        allow_truncated_sampling: bool = False,
        val_responses: AtLeast1 = 8,
        replay: PathText | None = None,
    ) -> None:
        super().__init__()
        total = prompts_per_epoch * responses_per_prompt
        if total % responses_per_step:
            raise UserError(
                f"An epoch of datamodule.prompts_per_epoch={prompts_per_epoch} times"
                f" responses_per_prompt={responses_per_prompt} is {total} responses, not a multiple"
                f" of responses_per_step={responses_per_step}: its last rollout step would make"
                " updates of fewer sequences. Change one of the three."
            )
        self.source, self.tokenizer, self.allocator = source, tokenizer, allocator
        self.seed = seed
        self.prompts_per_epoch, self.responses_per_step = prompts_per_epoch, responses_per_step
        self.responses_per_prompt = responses_per_prompt
        self.total_budget, self.steps_per_epoch = total, total // responses_per_step
        self.max_prompt_tokens, self.on_too_long = max_prompt_tokens, on_too_long
        self.on_overlap = on_overlap
        self.val_responses = val_responses
        check_truncation(top_p, top_k, allow_truncated_sampling)
        self.params = SamplingParams(temperature, max_response_tokens, top_p, top_k)
        if replay is not None and not isinstance(allocator, Uniform):
            raise UserError(
                f"replay={replay} trains on recorded rollouts, over which a sampler has no say: add"
                " sampler=uniform."
            )
        self.replay = replay
        self.replay_files = [] if replay is None else rollout_files(replay, "replay")
        self.train_prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []
        self.loader: Iterable[Update] = ()
        self.rollout_step = self.epoch = 0
        self.budgets: dict[str, int] | None = None
        self.next_prompt = self.drawn = 0  # within the epoch's shard
        self.exact = True
        self._shard: tuple[int, list[Prompt]] | None = None  # of an epoch: the data set is shuffled
        self._fingerprint: dict[str, Any] = {}  # computed once

    # --- prompts ----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.train_prompts:
            return
        self.train_prompts, self.val_prompts = self.encoded("train"), self.encoded("val")
        prompts, limits = [*self.train_prompts, *self.val_prompts], limits_of(self.tokenizer)
        check_prompts(limits, prompts)
        longest = max(len(prompt.token_ids) for prompt in prompts)  # those that are really there
        limit = self.params.max_response_tokens
        check_length(limits, self.max_prompt_tokens, limit, longest)
        self.train_prompts = apart(self.train_prompts, self.val_prompts, self.on_overlap)
        check_alike(self.train_prompts, self.val_prompts)
        if len(self.train_prompts) < self.prompts_per_epoch:
            raise UserError(
                f"datamodule.prompts_per_epoch={self.prompts_per_epoch}, but the data has only"
                f" {len(self.train_prompts)} training prompts. Lower it, or give more data"
                " (data.max_prompts, on_too_long and on_overlap may leave prompts out)."
            )

    def encoded(self, split: str) -> list[Prompt]:
        limit, on_too_long = self.max_prompt_tokens, self.on_too_long
        loaded = self.source.load(split)
        return self.source.template.encode(loaded, self.tokenizer, limit, on_too_long)

    def shard(self) -> list[Prompt]:
        """The prompts of the current epoch, in the order they will be drawn."""
        if self._shard is None or self._shard[0] != self.epoch:
            shards = len(self.train_prompts) // self.prompts_per_epoch
            passed, index = divmod(self.epoch, shards)
            key = derive_seed(self.seed, "order", passed)
            generator = np.random.Generator(np.random.Philox(key=key))
            order = generator.permutation(len(self.train_prompts))
            chosen = order[index * self.prompts_per_epoch : (index + 1) * self.prompts_per_epoch]
            self._shard = self.epoch, [self.train_prompts[i] for i in chosen]
        return self._shard[1]

    # --- budgets ----------------------------------------------------------------------------

    def set_budgets(self, budgets: dict[str, int]) -> None:
        """Begins an epoch under these budgets, by prompt id of the shard.

        Raises:
            ValueError: they are not of the shard, not >= 0, or not of the epoch's total.
        """
        if budgets.keys() != {prompt.id for prompt in self.shard()}:
            raise ValueError("budgets are not those of this epoch's shard")
        if min(budgets.values()) < 0 or sum(budgets.values()) != self.total_budget:
            raise ValueError(f"budgets sum to {sum(budgets.values())}, not {self.total_budget}")
        self.budgets, self.next_prompt, self.drawn = dict(budgets), 0, 0

    # --- rollout steps ----------------------------------------------------------------------

    def epoch_in_progress(self) -> bool:
        return self.budgets is not None

    def next_prompts(self) -> tuple[list[Prompt], list[int]]:
        """The prompts of the next rollout step and their budgets: whole groups, up to the quota.

        What one step overshoots the next gives back, so the epoch's total is exact.
        """
        assert self.budgets is not None, "the epoch has no budgets"
        step_in_epoch = self.rollout_step % self.steps_per_epoch
        quota, shard = (step_in_epoch + 1) * self.responses_per_step, self.shard()
        prompts: list[Prompt] = []
        while self.drawn < quota:
            prompts.append(shard[self.next_prompt])
            self.drawn += self.budgets[shard[self.next_prompt].id]
            self.next_prompt += 1
        return prompts, [self.budgets[prompt.id] for prompt in prompts]

    def step_drawn(self) -> None:
        """Moves on to the next rollout step, before anything of this one is trained on."""
        self.rollout_step += 1
        if self.rollout_step % self.steps_per_epoch == 0:
            self.epoch, self.budgets = self.epoch + 1, None

    def others(self, used: set[str], count: int) -> list[Prompt]:
        """Up to `count` training prompts that are not in use, in an order of this rollout step."""
        key = derive_seed(self.seed, "others", self.rollout_step)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self.train_prompts))
        free = (self.train_prompts[i] for i in order if self.train_prompts[i].id not in used)
        return list(itertools.islice(free, count))

    def replayed(self) -> Rollouts:
        """The recorded rollouts of this rollout step."""
        step = self.rollout_step
        return read_rollouts(self.replay_files[step], step, self.tokenizer)

    def exhausted(self) -> str | None:
        ended = self.replay_files and self.rollout_step >= len(self.replay_files)
        return f"the end of replay={self.replay}" if ended else None

    def train_dataloader(self) -> Iterable[Update]:
        return self.loader

    # --- resume -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "rollout_step": self.rollout_step,
            "fingerprint": self.fingerprint(),
            "epoch": self.epoch,
            "budgets": self.budgets,
            "next_prompt": self.next_prompt,
            "drawn": self.drawn,
            "total_budget": self.total_budget,
            "allocator": self.allocator.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["total_budget"] != self.total_budget:
            raise UserError(
                f"The checkpoint's epochs have {state['total_budget']} responses, this run's"
                f" {self.total_budget}. Resume with the sizes of the checkpoint, or start a new run"
                " from its weights with init_from=CHECKPOINT."
            )
        if before := state.get("fingerprint"):  # older checkpoints have none
            fingerprint.refuse(self.changes(before, self.fingerprint()))
        self.rollout_step = state["rollout_step"]
        self.epoch, self.budgets = state["epoch"], state["budgets"]
        self.next_prompt, self.drawn = state["next_prompt"], state["drawn"]
        self.allocator.load_state_dict(state["allocator"])

    @property
    def epochs_done(self) -> int:
        return self.epoch

    def fingerprint(self) -> dict[str, Any]:
        """What tells this run's data from another's; known once `setup` has been called."""
        if not self._fingerprint:
            self._fingerprint = {
                "train": fingerprint.of_prompts(self.train_prompts),
                "val": fingerprint.of_prompts(self.val_prompts),
                "replay": fingerprint.of_files(self.replay_files) if self.replay_files else None,
            }
        return self._fingerprint

    def changes(self, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """In what two fingerprints differ, that must not."""
        found = [
            fingerprint.prompts_differ(before["train"], now["train"], "training"),
            fingerprint.files_differ(before["replay"], now["replay"]),
        ]
        if self.exact:
            found.append(fingerprint.prompts_differ(before["val"], now["val"], "validation"))
        return [fault for fault in found if fault]


def check_truncation(top_p: float, top_k: int, allowed: bool) -> None:
    """Raises a UserError for truncation not asked for twice."""
    if top_p == 1 and top_k == 0:
        return
    if not allowed:
        raise UserError(
            f"datamodule.top_p={top_p} with top_k={top_k} trains on samples of another distribution"
            " than the one whose log-probs the loss takes. Leave them at 1 and 0, or insist with"
            " datamodule.allow_truncated_sampling=true."
        )
    log.warning("Truncated sampling: ratios and gradients are of the whole distribution.")
