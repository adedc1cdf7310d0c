"""A sized, lazy loader: a rollout step is drawn when its first microbatch is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from rlzoo.errors import UserError
from rlzoo.types import RolloutBatch, Rollouts


class StepSource(Protocol):
    """What the loader draws from."""

    steps_per_epoch: int
    microbatches_per_step: int

    def epoch_in_progress(self) -> bool: ...

    def next_rollouts(self) -> Rollouts: ...

    def prepare(self, rollouts: Rollouts) -> list[RolloutBatch]: ...


class RolloutLoader:
    """Yields the microbatches of one epoch's rollout steps, from wherever the source stands.

    The constant length matters: Lightning prefetches from an unsized loader, which would draw a
    step before the last one has been trained on. The source's state has moved on before the first
    microbatch of a step is handed out, so a boundary checkpoint is whole.
    """

    def __init__(self, source: StepSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.steps_per_epoch * self.source.microbatches_per_step

    def __iter__(self) -> Iterator[RolloutBatch]:
        if not self.source.epoch_in_progress():  # Lightning would ask again, for ever
            raise UserError(
                "Nothing planned this epoch's budgets: sampler.callback, or callbacks.sampler, is left"
                " out. Put it back; rlzoo.callbacks.Replan asks the allocator and does no more."
            )
        while self.source.epoch_in_progress():
            yield from self.source.prepare(self.source.next_rollouts())
