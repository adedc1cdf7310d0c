"""Where the loop meets Lightning's: its parts, what Lightning trains on, and the boundary after the
last update of each rollout step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from lightning import Callback, LightningModule, Trainer

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.callbacks.broken import refuse_broken_update
from rlzoo.callbacks.checkpoint import Checkpoint
from rlzoo.callbacks.doctor import Doctor
from rlzoo.callbacks.export import Export
from rlzoo.callbacks.preemption import Preemption
from rlzoo.callbacks.rank_watch import RankWatch
from rlzoo.callbacks.replan import Replan
from rlzoo.callbacks.rollout_log import RolloutLog
from rlzoo.callbacks.sft_log import SFTLog
from rlzoo.callbacks.state import Cursor, Run
from rlzoo.callbacks.validation import Validation
from rlzoo.callbacks.weight_sync import WeightSync
from rlzoo.errors import UserError
from rlzoo.models.checkpoints import run_state
from rlzoo.ranks.exchange import all_gather
from rlzoo.types import Update

MEASUREMENTS = 2  # boundaries at which memory is told: after the first, Adam's states are there
Data = TypeVar("Data", bound=Cursor)
Algo = TypeVar("Algo", bound=PolicyAlgorithm)


@dataclass(frozen=True)
class Parts:
    """The loop's parts, by the names they have in conf/callbacks; None leaves one out.

    Each is a Lightning callback for what is its own affair (what it saves, an exception). What has
    a place in the loop is called there, in whatever order the parts were given.
    """

    rank_watch: RankWatch | None = None
    weight_sync: WeightSync | None = None
    doctor: Doctor | None = None
    sampler: Replan | None = None
    validation: Validation | None = None
    rollout_log: RolloutLog | None = None
    sft_log: SFTLog | None = None
    checkpoint: Checkpoint | None = None
    preemption: Preemption | None = None
    export: Export | None = None

    def __post_init__(self) -> None:
        """Raises a UserError for a callback of another kind under the name of a part."""
        for name, wanted in self.kinds().items():
            part = getattr(self, name)
            if part is not None and not isinstance(part, wanted):
                raise UserError(
                    f"callbacks.{name} must be a rlzoo.callbacks.{wanted.__name__}, got"
                    f" {type(part).__name__}. Give a callback of your own another name."
                )

    @classmethod
    def kinds(cls) -> dict[str, type[Callback]]:
        """The class of each part, by its name."""
        return {name: get_args(kind)[0] for name, kind in get_type_hints(cls).items()}

    @classmethod
    def name_of(cls, callback: Callback) -> str | None:
        """The name under which alone the loop would call a callback of this kind."""
        kinds = cls.kinds().items()
        return next((name for name, kind in kinds if isinstance(callback, kind)), None)

    @property
    def present(self) -> list[Callback]:
        found = [getattr(self, field.name) for field in fields(self)]
        return [part for part in found if part is not None]


class Updates:
    """What Lightning trains on: an epoch's updates, made as it asks for them.

    The constant length matters: Lightning prefetches from an unsized loader, which would draw a
    step before the last one has been trained on.
    """

    def __init__(self, epoch: Callable[[], Iterator[Update]], length: int) -> None:
        self.epoch, self.length = epoch, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Update]:
        return self.epoch()


class Seam(Callback, Generic[Data, Algo]):
    """Calls `boundary` between rollout steps, and books the seconds of training between them.

    Stands last among the Trainer's callbacks, so that `trainer.should_stop`, set by whichever of
    them, ends the run at a boundary, where weights, log and checkpoint belong together.

    Args:
        run: what the run is; its state is saved under the name "Loop".
        data: where it stands.
        algo: what learns.
        parts: see Parts.
        begun: called once nothing of what was asked for has been refused.

    Raises:
        UserError: a part that this loop does not call.
    """

    state_key = "Loop"
    turns: tuple[str, ...]  # the parts that it calls, by name

    def __init__(
        self,
        run: Run,
        data: Data,
        algo: Algo,
        parts: Parts,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        for field in fields(parts):
            if getattr(parts, field.name) is not None and field.name not in self.turns:
                raise UserError(
                    f"callbacks.{field.name} would do nothing: {type(self).__name__} has no turn"
                    " for it. Leave it out."
                )
        self.run, self.data, self.algo, self.parts, self.begun = run, data, algo, parts, begun
        self._training: ExitStack | None = None  # phase and bar of training, while it lasts
        self.due = 0  # microbatches of the rollout step in training
        self.measured: Callable[[dict[str, float], bool], None] = lambda peaks, first: None
        self.measurements = MEASUREMENTS

    @property
    def updates_per_step(self) -> int:
        raise NotImplementedError

    def boundary(self, trainer: Trainer) -> None:
        """What happens between two rollout steps."""
        raise NotImplementedError

    def on_train_batch_start(self, *args: Any) -> None:
        if self._training is None:
            self._training = ExitStack()
            self._training.enter_context(self.run.ledger.phase("training"))
            bar = self.run.bars.phase("training", self.due, "microbatches")
            self.algo.advance = self._training.enter_context(bar)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        update: Update,
        batch_idx: int,
    ) -> None:
        self.postpone_stop(trainer)
        if update.last:
            self.end_training()
            refuse_broken_update(self.algo, self.run.ledger.updates)
            self.run.settle_end(self.data, trainer.max_epochs)
            self.boundary(trainer)
            self.postpone_stop(trainer)
            trainer.should_stop = self.run.ended_by is not None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run.ended_by is None:
            self.postpone_stop(trainer)

    def postpone_stop(self, trainer: Trainer) -> None:
        """Makes the next boundary the end, if something has asked for one."""
        if trainer.should_stop:
            trainer.should_stop, self.run.asked_to_stop = False, True

    def call_others(self, trainer: Trainer) -> None:
        """Calls `on_boundary(run, algo)` of every callback of one's own that has it; what it adds
        to `run.row` is written with the row of the step."""
        for callback in callbacks_of(trainer):
            if hasattr(callback, "on_boundary"):
                callback.on_boundary(self.run, self.algo)

    def tell_memory(self) -> None:
        """At the first boundaries of this process: the most memory that each phase has taken, of
        the rank where that was most; collective."""
        ledger = self.run.ledger
        if ledger.peaks is None:
            return
        found = all_gather(ledger.peaks.bytes)
        largest = {name: max(each.get(name, 0) for each in found) for name in found[0]}
        self.measured(largest, self.measurements == MEASUREMENTS)
        self.measurements -= 1
        if self.measurements == 0:
            ledger.peaks = None

    def save_and_stop(self, trainer: Trainer) -> None:
        """Saves what is due; ends the process if it was told to stop and the run goes on."""
        told, parts = self.run.preempted(), self.parts
        if parts.checkpoint:
            parts.checkpoint.save_if_due(self.run, self.data, trainer, preempted=told is not None)
        if told and not self.run.ended_by and parts.preemption:
            parts.preemption.stop(told)

    def on_exception(self, *args: Any) -> None:
        self.end_training()

    def end_training(self) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None

    def state_dict(self) -> dict[str, Any]:
        return self.run.state_dict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.run.load_state_dict(run_state(checkpoint))


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All of them; Lightning does not declare the attribute."""
    found: list[Callback] = vars(trainer)["callbacks"]
    return found
