"""The loop: what a run does, in the order it does it.

Lightning's Trainer owns the innermost part: forward, backward and optimizer step of a microbatch.
All the rest stands here. `RolloutLoop.microbatches` draws a rollout step and makes of it what
Lightning trains on; `RolloutLoop.boundary` is what follows once it has been trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

from lightning import Callback, LightningModule, Trainer

from rlzoo import callbacks
from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.algos.sft import SFT
from rlzoo.callbacks.broken import refuse_broken_update
from rlzoo.callbacks.seam import Microbatches, Seam
from rlzoo.callbacks.state import Run
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.data.sft import SFTDataModule
from rlzoo.errors import UserError
from rlzoo.types import RolloutBatch, Rollouts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The loop's parts, by the names they have in conf/callbacks; None leaves one out.

    Each is a Lightning callback for what is its own affair (what it saves, an exception). What has
    a place in the loop is called there, in whatever order the parts were given.
    """

    rank_watch: callbacks.RankWatch | None = None
    weight_sync: callbacks.WeightSync | None = None
    doctor: callbacks.Doctor | None = None
    sampler: callbacks.Replan | None = None
    validation: callbacks.Validation | None = None
    rollout_log: callbacks.RolloutLog | None = None
    sft_log: callbacks.SFTLog | None = None
    checkpoint: callbacks.Checkpoint | None = None
    preemption: callbacks.Preemption | None = None
    export: callbacks.Export | None = None

    def __post_init__(self) -> None:
        """Raises a UserError for a callback of another kind under the name of a part."""
        for name, kind in get_type_hints(Parts).items():
            part, wanted = getattr(self, name), get_args(kind)[0]
            if part is not None and not isinstance(part, wanted):
                raise UserError(
                    f"callbacks.{name} must be a rlzoo.callbacks.{wanted.__name__}, got"
                    f" {type(part).__name__}. Give a callback of your own another name."
                )

    @property
    def present(self) -> list[Callback]:
        found = [getattr(self, field.name) for field in fields(self)]
        return [part for part in found if part is not None]


class RolloutLoop(Seam):
    """Online reinforcement learning.

    Args:
        run, data, algo: what the run is; its prompts, budgets and cursor; what learns from them.
        parts: see Parts.
        begun: called once nothing of what was asked for has been refused.
    """

    def __init__(
        self,
        run: Run,
        data: RolloutDataModule,
        algo: PolicyAlgorithm,
        parts: Parts,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(run)
        self.data, self.algo, self.parts, self.begun = data, algo, parts, begun

    # --- before the first rollout step ------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = self.data
        self.run.drawer.golds_to_try = [*data.train_prompts, *data.val_prompts]
        length = data.steps_per_epoch * self.microbatches_per_step
        data.loader = Microbatches(self.microbatches, length)
        if self.run.endless(trainer.max_epochs) and not data.replay_files:
            log.warning(
                "No limit ends this run (limits.* are null, trainer.max_epochs is -1): it goes on"
                " until it is told to stop (SIGTERM, which saves first)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run, data, algo, parts = self.run, self.data, self.algo, self.parts
        self.begun()
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

    def microbatches(self) -> Iterator[RolloutBatch]:
        """An epoch of rollout steps: Lightning trains on a microbatch before it asks for the next.

        `draw` moves the cursor on before the first microbatch of a step is handed out, so that what
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
        """The engine draws, the reward judges, the ledger books; then the engine sleeps."""
        run, data = self.run, self.data
        prompts, budgets = data.next_prompts()
        if data.replay_files:
            rollouts = data.replayed()
            run.ledger.drew("replay", rollouts.lengths.tolist())
        else:
            rollouts = run.drawer.draw_in_rounds(prompts, budgets, data)
            run.engine.sleep()  # until the next weight sync
        data.step_drawn()
        run.rollouts = rollouts
        return rollouts

    def prepare(self, rollouts: Rollouts) -> list[RolloutBatch]:
        bar = self.run.bars.phase("scoring", len(rollouts), "responses")
        with self.run.ledger.phase("scoring"), bar as advance:
            batches = made_of(rollouts, self.algo, advance)
        if self.parts.doctor:
            self.parts.doctor.compare(self.run, self.algo)
        return batches

    # --- after a rollout step ---------------------------------------------------------------

    def boundary(self, trainer: Trainer) -> None:
        run, data, algo, parts = self.run, self.data, self.algo, self.parts
        refuse_broken_update(algo, run.ledger.updates)
        if parts.weight_sync:
            parts.weight_sync.sync(run, data, algo)
        if parts.validation and parts.validation.due(data.rollout_step, run.ended_by is not None):
            parts.validation.validate(run, data)
        self.call_others(trainer, algo)
        if parts.rollout_log:
            parts.rollout_log.write(run, data, algo)
        save_and_stop(run, data, parts, trainer)

    @property
    def cursor(self) -> RolloutDataModule:
        return self.data

    @property
    def microbatches_per_step(self) -> int:
        return self.algo.updates_per_step * self.algo.trainer.accumulate_grad_batches


def made_of(
    rollouts: Rollouts, algo: PolicyAlgorithm, on_progress: Callable[[int], None] = lambda n: None
) -> list[RolloutBatch]:
    """The microbatches of this rank: which rollouts train, what the trainer's own models say of
    them, what each is worth."""
    units = algo.training_units(rollouts)
    algo.score(rollouts, units, on_progress)
    credit = algo.credit(rollouts)
    trainer = algo.trainer
    return algo.microbatches(
        rollouts,
        units,
        credit,
        accumulate=trainer.accumulate_grad_batches,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )


class SupervisedLoop(Seam):
    """Supervised training: blocks of updates in place of rollout steps, nothing is drawn.

    Args:
        run, data, algo, parts, begun: as in RolloutLoop.
    """

    def __init__(
        self,
        run: Run,
        data: SFTDataModule,
        algo: SFT,
        parts: Parts,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(run)
        self.data, self.algo, self.parts, self.begun = data, algo, parts, begun

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.algo.agree_on_pieces(self.data.val_batches)
        self.data.loader = Microbatches(self.microbatches, self.microbatches_per_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun()
        if self.parts.rank_watch:
            self.parts.rank_watch.begin()
        if self.parts.checkpoint:
            self.parts.checkpoint.begin(self.run, trainer)
        if self.parts.preemption:
            self.parts.preemption.listen(self.run)

    def microbatches(self) -> Iterator[RolloutBatch]:
        """A block of updates."""
        for update in self.data.updates(self.algo.trainer.accumulate_grad_batches):
            self.algo.agree_on_pieces(update)
            yield from update

    def boundary(self, trainer: Trainer) -> None:
        refuse_broken_update(self.algo, self.run.ledger.updates)
        self.call_others(trainer, self.algo)
        if self.parts.sft_log:
            self.parts.sft_log.write(self.run, self.data, self.algo)
        save_and_stop(self.run, self.data, self.parts, trainer)

    @property
    def cursor(self) -> SFTDataModule:
        return self.data

    @property
    def microbatches_per_step(self) -> int:
        return self.data.updates_per_step * self.algo.trainer.accumulate_grad_batches


def save_and_stop(
    run: Run, data: RolloutDataModule | SFTDataModule, parts: Parts, trainer: Trainer
) -> None:
    """Saves what is due; ends the process if it was told to stop, unless the run ends anyway."""
    told = run.preempted()
    if parts.checkpoint:
        parts.checkpoint.save_if_due(run, data, trainer, preempted=told is not None)
    if told and not run.ended_by and parts.preemption:
        parts.preemption.stop(told)
