"""Prompts, budgets and rollout steps: everything a run's data is, and where it stands."""

from __future__ import annotations

import itertools
import logging
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlzoo.allocators.base import Allocator
from rlzoo.allocators.uniform import Uniform
from rlzoo.data import fingerprint
from rlzoo.data.base import RunDataModule
from rlzoo.data.draw import Drawer, concatenate
from rlzoo.data.leaks import ON_OVERLAP, apart, check_alike
from rlzoo.data.prompts import PromptSource
from rlzoo.data.rollout_files import read_rollouts, rollout_files
from rlzoo.data.rollout_loader import RolloutLoader
from rlzoo.engines.base import Engine, SamplingParams
from rlzoo.errors import UserError, check_at_least, check_choice
from rlzoo.models.limits import check_length, check_prompts, limits_of
from rlzoo.report.ledger import Limits
from rlzoo.report.progress import Bars
from rlzoo.rewards.base import Reward
from rlzoo.rng import derive_seed
from rlzoo.types import Prompt, RolloutBatch, Rollouts
from rlzoo.values import AtLeast0, AtLeast1, PathText, Positive, Seed, ShareAbove0

log = logging.getLogger(__name__)


class RolloutDataModule(RunDataModule):
    """Draws rollout steps for any algorithm, under budgets that a sampler sets.

    An epoch is a shard of `prompts_per_epoch` prompts, in a seeded order that wraps over the data
    set (what does not fill a shard sits out one pass). Its budgets sum to
    `prompts_per_epoch * responses_per_prompt`, which makes a fixed number of rollout steps.

    Args:
        source: prompts of each split (`data=`).
        tokenizer: renders prompts and decodes responses.
        engine: draws responses (`engine=`).
        reward: scores them (`reward=`).
        allocator: the sampler's; kept here because its state is resumed with the budgets.
        bars, limits: see RunDataModule.
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

    Raises:
        UserError: sizes that do not fit each other or the data.
    """

    def __init__(
        self,
        source: PromptSource,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        reward: Reward,
        allocator: Allocator,
        bars: Bars,
        limits: Limits,
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
        super().__init__(bars, limits)
        sizes = {
            "prompts_per_epoch": prompts_per_epoch,
            "responses_per_prompt": responses_per_prompt,
            "responses_per_step": responses_per_step,
            "max_prompt_tokens": max_prompt_tokens,
            "max_response_tokens": max_response_tokens,
            "val_responses": val_responses,
        }
        for key, value in sizes.items():
            if value < 1:
                raise UserError(f"datamodule.{key} must be at least 1, got {value}.")
        total = prompts_per_epoch * responses_per_prompt
        if total % responses_per_step:
            raise UserError(
                f"An epoch of datamodule.prompts_per_epoch={prompts_per_epoch} times"
                f" responses_per_prompt={responses_per_prompt} is {total} responses, not a multiple"
                f" of responses_per_step={responses_per_step}: its last rollout step would make"
                " updates of fewer sequences. Change one of the three."
            )
        self.source, self.tokenizer, self.engine, self.reward = source, tokenizer, engine, reward
        self.allocator, self.seed = allocator, seed
        self.prompts_per_epoch, self.responses_per_step = prompts_per_epoch, responses_per_step
        self.responses_per_prompt = responses_per_prompt
        self.total_budget, self.steps_per_epoch = total, total // responses_per_step
        self.max_prompt_tokens, self.on_too_long = max_prompt_tokens, on_too_long
        check_choice("datamodule.on_overlap", on_overlap, ON_OVERLAP)
        self.on_overlap = on_overlap
        self.val_responses = val_responses
        check_truncation(top_p, top_k, allow_truncated_sampling)
        params = SamplingParams(temperature, max_response_tokens, top_p, top_k)
        self.drawer = Drawer(engine, reward, tokenizer, params, self.ledger, bars, seed)
        if replay is not None and not isinstance(allocator, Uniform):
            raise UserError(
                f"replay={replay} trains on recorded rollouts, over which a sampler has no say: add"
                " sampler=uniform."
            )
        self.replay = replay
        self.replay_files = [] if replay is None else rollout_files(replay, "replay")
        self.train_prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []
        self.rollouts: Rollouts | None = None  # of the rollout step in training
        self.epoch = 0  # the epoch being drawn, or the next one
        self.budgets: dict[str, int] | None = None  # by prompt id; None between epochs
        self.next_prompt = self.drawn = 0  # within the epoch's shard
        self._fingerprint: dict[str, Any] = {}  # computed once

    # --- prompts ----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.train_prompts:
            return
        encode = lambda split: self.source.template.encode(  # noqa: E731
            self.source.load(split), self.tokenizer, self.max_prompt_tokens, self.on_too_long
        )
        self.train_prompts, self.val_prompts = encode("train"), encode("val")
        prompts, limits = [*self.train_prompts, *self.val_prompts], limits_of(self.tokenizer)
        check_prompts(limits, prompts)
        longest = max(len(prompt.token_ids) for prompt in prompts)  # those that are really there
        limit = self.drawer.params.max_response_tokens
        check_length(limits, self.max_prompt_tokens, limit, longest)
        self.train_prompts = apart(self.train_prompts, self.val_prompts, self.on_overlap)
        check_alike(self.train_prompts, self.val_prompts)
        if len(self.train_prompts) < self.prompts_per_epoch:
            raise UserError(
                f"datamodule.prompts_per_epoch={self.prompts_per_epoch}, but the data has only"
                f" {len(self.train_prompts)} training prompts. Lower it, or give more data"
                " (data.max_prompts, on_too_long and on_overlap may leave prompts out)."
            )
        self.drawer.golds_to_try = [*self.train_prompts, *self.val_prompts]
        if self.trainer is not None and self.endless:
            log.warning(
                "No limit ends this run (limits.* are null, trainer.max_epochs is -1): it goes on"
                " until it is told to stop (SIGTERM, which saves first)."
            )

    def shard(self) -> list[Prompt]:
        """The prompts of the current epoch, in the order they will be drawn."""
        shards = len(self.train_prompts) // self.prompts_per_epoch
        passed, index = divmod(self.epoch, shards)
        key = derive_seed(self.seed, "order", passed)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self.train_prompts))
        chosen = order[index * self.prompts_per_epoch : (index + 1) * self.prompts_per_epoch]
        return [self.train_prompts[i] for i in chosen]

    @property
    def endless(self) -> bool:
        """Whether nothing but a signal would end the run."""
        limited = any(limit is not None for limit in vars(self.limits).values())
        return not limited and not self.replay_files and self.trainer.max_epochs in (None, -1)

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

    @property
    def microbatches_per_step(self) -> int:
        updates = self.trainer.lightning_module.updates_per_step
        return updates * self.trainer.accumulate_grad_batches

    def epoch_in_progress(self) -> bool:
        return self.budgets is not None

    def next_rollouts(self) -> Rollouts:
        """Draws the next rollout step: the next prompts in order, whole groups, up to the quota.

        What one step overshoots the next gives back, so the epoch's total is exact.
        """
        step_in_epoch = self.rollout_step % self.steps_per_epoch
        quota, shard = (step_in_epoch + 1) * self.responses_per_step, self.shard()
        prompts: list[Prompt] = []
        while self.drawn < quota:
            prompts.append(shard[self.next_prompt])
            self.drawn += self.budgets[shard[self.next_prompt].id]
            self.next_prompt += 1
        budgets = [self.budgets[prompt.id] for prompt in prompts]
        if self.replay_files:
            self.rollouts = self.replayed()
        else:
            self.rollouts = self.drawn_in_rounds(prompts, budgets)
            self.engine.sleep()  # until the next weight sync
        self.rollout_step += 1
        if self.rollout_step % self.steps_per_epoch == 0:
            self.epoch, self.budgets = self.epoch + 1, None
        return self.rollouts

    def drawn_in_rounds(self, prompts: list[Prompt], budgets: list[int]) -> Rollouts:
        """Draws, and draws others in the place of prompts that the allocator is not done with."""
        parts = [self.drawer.draw(prompts, budgets, "train", self.rollout_step)]
        used = {prompt.id for prompt in prompts}
        for round_ in range(1, self.allocator.max_rounds):
            ids, last = [prompt.id for prompt in parts[-1].prompts], parts[-1]
            sizes = torch.bincount(last.group_ids, minlength=len(ids)).tolist()
            rewards = [part.tolist() for part in last.rewards.split(sizes)]
            lengths = [part.tolist() for part in last.lengths.split(sizes)]
            self.allocator.observe(ids, rewards, lengths)
            fresh = self.others(used, sum(not self.allocator.done(i) for i in ids))
            if not fresh:
                break
            used |= {prompt.id for prompt in fresh}
            total = len(fresh) * self.responses_per_prompt
            budgets = self.allocator.allocate([prompt.id for prompt in fresh], total, round_)
            parts.append(self.drawer.draw(fresh, budgets, "train", self.rollout_step, round_))
        self.row["rounds"] = len(parts)
        return concatenate(parts)

    def others(self, used: set[str], count: int) -> list[Prompt]:
        """Up to `count` training prompts that are not in use, in an order of this rollout step."""
        key = derive_seed(self.seed, "others", self.rollout_step)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self.train_prompts))
        free = (self.train_prompts[i] for i in order if self.train_prompts[i].id not in used)
        return list(itertools.islice(free, count))

    def replayed(self) -> Rollouts:
        """The recorded rollouts of this rollout step, booked apart from those that are paid for."""
        step = self.rollout_step
        rollouts = read_rollouts(self.replay_files[step], step, self.tokenizer)
        self.ledger.drew("replay", rollouts.lengths.tolist())
        return rollouts

    def limit_met(self) -> str | None:
        ended = self.replay_files and self.rollout_step >= len(self.replay_files)
        return super().limit_met() or (f"the end of replay={self.replay}" if ended else None)

    def prepare(self, rollouts: Rollouts) -> list[RolloutBatch]:
        bar = self.bars.phase("scoring", len(rollouts), "responses")
        with self.ledger.phase("scoring"), bar as advance:
            return self.trainer.lightning_module.prepare(rollouts, advance)

    def train_dataloader(self) -> RolloutLoader:
        return RolloutLoader(self)

    def teardown(self, stage: str) -> None:
        self.drawer.reward.close()
        self.engine.close()

    # --- resume -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self.run_state() | {
            "epoch": self.epoch,
            "budgets": self.budgets,
            "next_prompt": self.next_prompt,
            "drawn": self.drawn,
            "total_budget": self.total_budget,
            "allocator": self.allocator.state_dict(),
            "engine": self.engine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["total_budget"] != self.total_budget:
            raise UserError(
                f"The checkpoint's epochs have {state['total_budget']} responses, this run's"
                f" {self.total_budget}. Resume with the sizes of the checkpoint, or start a new run"
                " from its weights with init_from=CHECKPOINT."
            )
        self.load_run_state(state)
        self.epoch, self.budgets = state["epoch"], state["budgets"]
        self.next_prompt, self.drawn = state["next_prompt"], state["drawn"]
        self.allocator.load_state_dict(state["allocator"])
        self.engine.load_state_dict(state["engine"])

    @property
    def epochs_done(self) -> int:
        return self.epoch

    def fingerprint(self) -> dict[str, Any]:
        if not self._fingerprint:
            self._fingerprint = {
                "train": fingerprint.of_prompts(self.train_prompts),
                "val": fingerprint.of_prompts(self.val_prompts),
                "replay": fingerprint.of_files(self.replay_files) if self.replay_files else None,
                "engine": type(self.engine).__name__,
            }
        return self._fingerprint

    def data_changes(self, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        found = [
            fingerprint.prompts_differ(before["train"], now["train"], "training"),
            fingerprint.files_differ(before["replay"], now["replay"]),
        ]
        if self.exact:
            found.append(fingerprint.prompts_differ(before["val"], now["val"], "validation"))
            if before["engine"] != now["engine"]:
                found.append(f"{before['engine']} drew its responses, now {now['engine']} would")
        return [fault for fault in found if fault]


def check_truncation(top_p: float, top_k: int, allowed: bool) -> None:
    """Raises a UserError for values out of range, and for truncation that was not asked for twice."""
    if not 0 < top_p <= 1:
        raise UserError(f"datamodule.top_p must be in (0, 1], got {top_p}; 1 keeps every token.")
    check_at_least("datamodule.top_k", top_k, 0)
    if (top_p < 1 or top_k > 0) and not allowed:
        raise UserError(
            f"datamodule.top_p={top_p} with top_k={top_k} trains on samples of another distribution"
            " than the one whose log-probs the loss takes. Leave them at 1 and 0, or insist with"
            " datamodule.allow_truncated_sampling=true."
        )
    if top_p < 1 or top_k > 0:
        log.warning("Truncated sampling: ratios and gradients are of the whole distribution.")
