"""The loop: what a run does, in the order it does it.

Lightning's Trainer owns the innermost part: forward, backward and optimizer step of a microbatch.
All the rest stands here. `RolloutLoop.updates` draws a rollout step and makes of it what
Lightning trains on; `RolloutLoop.boundary` is what follows once it has been trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from lightning import LightningModule, Trainer

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.algos.sft import SFT
from rlzoo.callbacks.seam import Seam, Updates
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.data.sft import SFTDataModule
from rlzoo.errors import UserError
from rlzoo.types import Rollouts, Update

log = logging.getLogger(__name__)


class RolloutLoop(Seam[RolloutDataModule, PolicyAlgorithm]):
    """Online reinforcement learning."""

    turns = (
        *("rank_watch", "weight_sync", "doctor", "sampler", "validation", "rollout_log"),
        *("checkpoint", "preemption", "export"),
    )

    # --- before the first rollout step ------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = self.data
        self.run.drawer.golds_to_try = [*data.train_prompts, *data.val_prompts]
        length = data.steps_per_epoch * self.updates_per_step
        data.loader = Updates(self.updates, length)
        if self.run.endless(trainer.max_epochs) and not data.replay_files:
            log.warning(
                "No limit ends this run (limits.* are null, trainer.max_epochs is -1): it goes on"
                " until it is told to stop (SIGTERM, which saves first)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run, data, algo, parts = self.run, self.data, self.algo, self.parts
        self.begun()
        if not data.replay_files:
            run.bars.print_line(self.costs())
        if parts.rank_watch:
            parts.rank_watch.begin()
        if parts.weight_sync:
            parts.weight_sync.begin(run, data, algo)  # starts the engine
        if parts.doctor:
            parts.doctor.examine(run, data, algo)
        if parts.validation and data.rollout_step == 0:
            parts.validation.validate(run, data)
        if parts.rollout_log:
            parts.rollout_log.begin(run, data, trainer.loggers)
        if parts.checkpoint:
            parts.checkpoint.begin(run, trainer)
        if parts.preemption:
            parts.preemption.listen(run)

    # --- a rollout step ---------------------------------------------------------------------

    def updates(self) -> Iterator[Update]:
        """An epoch of rollout steps: Lightning makes an update before it asks for the next.

        `draw` moves the cursor on before the first update of a step is handed out, so that what
        is saved at the step's boundary is whole.
        """
        if not self.data.epoch_in_progress():
            self.plan()
        while self.data.epoch_in_progress():
            rollouts = self.draw()
            yield from self.prepare(rollouts)  # Lightning: loss, backward, optimizer step

    def plan(self) -> None:
        """The sampler says how many responses each prompt of the epoch gets."""
        run, data, algo, sampler = self.run, self.data, self.algo, self.parts.sampler
        if sampler is None:  # Lightning would ask again, for ever
            raise UserError(
                "Nothing planned this epoch's budgets: sampler.callback, or callbacks.sampler, is"
                " left out. Put it back; rlzoo.callbacks.Replan asks the allocator, and no more."
            )
        sampler.plan(run, data, algo)
        asleep = getattr(run.engine, "asleep", True)  # an engine that does not say so is woken
        if sampler.uses_engine and asleep and self.parts.weight_sync:
            self.parts.weight_sync.sync(run, data, algo)

    def draw(self) -> Rollouts:
        """The rollout step that was drawn beside the one before, or one that is drawn now; with
        `pipeline=one_step` the next is begun."""
        run, data = self.run, self.data
        rollouts = run.ahead.take(data.train_prompts, self.algo.tis_cap is not None)
        if rollouts is None:
            rollouts = self.draw_now()
        data.step_drawn()
        run.rollouts = rollouts
        if run.draws_ahead or rollouts.lag:
            run.row["lag/updates"] = rollouts.lag
        if run.draws_ahead:
            if data.epoch_in_progress() and run.goes_on(self.algo.updates_per_step):
                run.ahead.begin(*data.next_prompts(), data.rollout_step)
        return rollouts

    def draw_now(self) -> Rollouts:
        """The engine draws, the reward judges, the ledger books; then the engine sleeps."""
        run, data = self.run, self.data
        prompts, budgets = data.next_prompts()
        if data.replay_files:
            rollouts = data.replayed()
            run.ledger.drew("replay", rollouts.lengths.tolist())
        else:
            rollouts = run.drawer.draw_in_rounds(prompts, budgets, data)
            if not run.draws_ahead:
                run.engine.sleep()  # until the next weight sync
        return rollouts

    def prepare(self, rollouts: Rollouts) -> list[Update]:
        bar = self.run.bars.phase("scoring", len(rollouts), "responses")
        with self.run.ledger.phase("scoring"), bar as advance:
            updates = updates_of(rollouts, self.algo, advance)
        self.due = sum(len(update.microbatches) for update in updates)
        if self.parts.doctor:
            self.parts.doctor.compare(self.run, self.algo)
        return updates

    # --- after a rollout step ---------------------------------------------------------------

    def boundary(self, trainer: Trainer) -> None:
        run, data, algo, parts = self.run, self.data, self.algo, self.parts
        ended = run.ended_by is not None
        if run.draws_ahead:
            run.ahead.complete()  # with the weights that it was begun with
        if parts.weight_sync:
            parts.weight_sync.sync(run, data, algo)
        if parts.validation and parts.validation.due(data, ended, self.pilots):
            parts.validation.validate(run, data)
        self.call_others(trainer)
        if parts.rollout_log:
            parts.rollout_log.write(run, data, algo)
        self.tell_memory()
        self.save_and_stop(trainer)

    @property
    def updates_per_step(self) -> int:
        return self.algo.updates_per_step

    @property
    def pilots(self) -> int:
        """Responses that a plan of an epoch's budgets draws."""
        return getattr(self.parts.sampler, "pilots", 0) * self.data.prompts_per_epoch

    def costs(self) -> str:
        """What a rollout step, a plan and a validation will draw, in a line."""
        data, limit = self.data, self.data.params.max_response_tokens
        step, val = data.responses_per_step, len(data.val_prompts) * data.val_responses
        told = [f"A rollout step draws {step:,} responses (up to {step * limit:,} tokens)"]
        if self.pilots:
            told.append(f"a plan, every {data.steps_per_epoch} steps, {self.pilots:,}")
        if self.parts.validation:
            every = self.parts.validation.interval(data, self.pilots)
            when = f"every {every} steps" if every else "at the start and the end"
            told.append(f"a validation, {when}, {val:,}")
        return ", ".join(told) + "."


def updates_of(
    rollouts: Rollouts, algo: PolicyAlgorithm, on_progress: Callable[[int], None] = lambda n: None
) -> list[Update]:
    """This rank's microbatches of each update: which rollouts train, what the trainer's own models
    say of them, what each is worth."""
    units = algo.training_units(rollouts)
    algo.score(rollouts, units, on_progress)
    credit = algo.credit(rollouts)
    rank, world_size = algo.trainer.global_rank, algo.trainer.world_size
    return algo.plan_updates(rollouts, units, credit, rank=rank, world_size=world_size)


class SupervisedLoop(Seam[SFTDataModule, SFT]):
    """Supervised training: blocks of updates in place of rollout steps, nothing is drawn."""

    turns = ("rank_watch", "sft_log", "checkpoint", "preemption", "export")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.data.loader = Updates(self.updates, self.updates_per_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun()
        if self.parts.rank_watch:
            self.parts.rank_watch.begin()
        if self.parts.checkpoint:
            self.parts.checkpoint.begin(self.run, trainer)
        if self.parts.preemption:
            self.parts.preemption.listen(self.run)

    def updates(self) -> Iterator[Update]:
        """A block of updates."""
        for update in self.data.updates(self.algo.tokens_per_microbatch, self.algo.pads):
            self.due = self.updates_per_step * len(update.microbatches)  # all have nearly as many
            yield update

    def boundary(self, trainer: Trainer) -> None:
        self.call_others(trainer)
        if self.parts.sft_log:
            self.parts.sft_log.write(self.run, self.data, self.algo)
        self.tell_memory()
        self.save_and_stop(trainer)

    @property
    def updates_per_step(self) -> int:
        return self.data.updates_per_step
