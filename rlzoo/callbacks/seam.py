"""Where the loop meets Lightning's: a boundary after the last microbatch of each rollout step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from lightning import Callback, LightningModule, Trainer

from rlzoo.callbacks.state import Cursor, Run
from rlzoo.models.checkpoints import run_state
from rlzoo.types import RolloutBatch


class Microbatches:
    """What Lightning trains on: an epoch's microbatches, made as it asks for them.

    The constant length matters: Lightning prefetches from an unsized loader, which would draw a
    step before the last one has been trained on.
    """

    def __init__(self, epoch: Callable[[], Iterator[RolloutBatch]], length: int) -> None:
        self.epoch, self.length = epoch, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[RolloutBatch]:
        return self.epoch()


class Seam(Callback):
    """Calls `boundary` between rollout steps, and books the seconds of training between them.

    Stands last among the Trainer's callbacks, so that `trainer.should_stop`, set by whichever of
    them, ends the run at a boundary, where weights, log and checkpoint belong together.

    Args:
        run: what is saved of it and restored is under the name "Loop" in a checkpoint.
    """

    state_key = "Loop"

    def __init__(self, run: Run) -> None:
        self.run = run
        self._training = ExitStack()  # phase and bar of training, while it lasts
        self._advance: Callable[[int], None] | None = None

    @property
    def cursor(self) -> Cursor:
        raise NotImplementedError

    @property
    def microbatches_per_step(self) -> int:
        raise NotImplementedError

    def boundary(self, trainer: Trainer) -> None:
        """What happens between two rollout steps."""
        raise NotImplementedError

    def on_train_batch_start(self, *args: Any) -> None:
        if self._advance is None:
            bar = self.run.bars.phase("training", self.microbatches_per_step, "microbatches")
            self._training.enter_context(self.run.ledger.phase("training"))
            self._advance = self._training.enter_context(bar)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        if self._advance is not None:
            self._advance(1)
        if trainer.should_stop:
            trainer.should_stop, self.run.asked_to_stop = False, True
        if batch.last:
            self.end_training()
            self.run.settle_end(self.cursor, trainer.max_epochs)
            self.boundary(trainer)
            trainer.should_stop = self.run.ended_by is not None

    def call_others(self, trainer: Trainer, algo: LightningModule) -> None:
        """Calls `on_boundary(run, algo)` of every callback of one's own that has it; what it adds
        to `run.row` is written with the row of the step."""
        for callback in callbacks_of(trainer):
            if hasattr(callback, "on_boundary"):
                callback.on_boundary(self.run, algo)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.end_training()

    def end_training(self) -> None:
        self._training.close()
        self._advance = None

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
