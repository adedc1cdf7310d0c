"""The loop: its order is the code's, not a configuration's."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from rlzoo.callbacks import Checkpoint, Validation
from rlzoo.callbacks.seam import Parts, Seam, Updates
from rlzoo.callbacks.state import Run
from rlzoo.errors import UserError
from rlzoo.loop import RolloutLoop, SupervisedLoop
from rlzoo.report.ledger import Ledger, Limits
from rlzoo.report.progress import Bars


class Data:
    """Three rollout steps of two updates."""

    rollout_step = epochs_done = 0
    prompts_per_epoch = 4

    def exhausted(self) -> None:
        return None


class Steps(Seam):
    def __init__(self, **limits: int) -> None:
        run = Run(Limits(**limits), Ledger(), Bars(enabled=False))
        super().__init__(run, Data(), torch.nn.Linear(1, 1), Parts())
        self.told: list[str] = []

    updates_per_step, turns = 2, ()

    def boundary(self, trainer: object) -> None:
        self.told.append(self.run.ended_by or "goes on")


def ended(loop: Seam, trainer: SimpleNamespace, last: bool) -> None:
    loop.on_train_batch_start()
    loop.on_train_batch_end(trainer, None, None, SimpleNamespace(last=last), 0)


def test_the_updates_have_a_length_and_a_step_is_drawn_only_when_it_is_asked_for():
    steps = []

    def epoch():
        for step in range(3):
            steps.append(step)
            yield from [(step, 0), (step, 1)]

    loader = Updates(epoch, 6)
    assert len(loader) == 6
    batches = iter(loader)
    assert steps == []
    assert [next(batches), next(batches)] == [(0, 0), (0, 1)] and steps == [0]
    assert len(list(batches)) == 4


def test_a_boundary_follows_the_last_update_of_a_step_alone():
    loop, trainer = Steps(), SimpleNamespace(should_stop=False, max_epochs=-1, callbacks=[])
    for last in (False, True, False, True):
        ended(loop, trainer, last)
    assert loop.told == ["goes on", "goes on"] and not trainer.should_stop
    assert "training" in loop.run.ledger.phases


def test_a_stop_that_any_callback_asks_for_waits_for_the_boundary():
    loop, trainer = Steps(), SimpleNamespace(should_stop=True, max_epochs=-1, callbacks=[])
    ended(loop, trainer, last=False)
    assert not trainer.should_stop and loop.told == []
    ended(loop, trainer, last=True)
    assert trainer.should_stop and loop.told == ["trainer.should_stop"]


class Asking(Steps):
    """Something asks for a stop while the boundary is being made."""

    def boundary(self, trainer: SimpleNamespace) -> None:
        super().boundary(trainer)
        trainer.should_stop = True


def test_a_stop_asked_for_in_a_boundary_or_at_the_end_of_an_epoch_ends_the_run_at_the_next():
    loop, trainer = Asking(), SimpleNamespace(should_stop=False, max_epochs=-1, callbacks=[])
    ended(loop, trainer, last=True)
    assert not trainer.should_stop and loop.told == ["goes on"]
    ended(loop, trainer, last=True)
    assert trainer.should_stop and loop.told[1:] == ["trainer.should_stop"]
    other, trainer = Steps(), SimpleNamespace(should_stop=True, max_epochs=-1, callbacks=[])
    other.on_train_epoch_end(trainer, None)
    assert not trainer.should_stop and other.run.asked_to_stop


def test_a_part_that_a_loop_does_not_call_is_refused():
    run = Run(Limits(), Ledger(), Bars(enabled=False))
    with pytest.raises(UserError, match="callbacks.validation would do nothing: SupervisedLoop"):
        SupervisedLoop(run, Data(), torch.nn.Linear(1, 1), Parts(validation=Validation()))


def test_a_limit_ends_the_run_at_the_boundary_and_every_part_knows_it():
    loop = Steps(max_updates=2)
    trainer = SimpleNamespace(should_stop=False, max_epochs=-1, callbacks=[])
    loop.run.ledger.updated(None)
    ended(loop, trainer, last=True)
    loop.run.ledger.updated(None)
    ended(loop, trainer, last=True)
    assert loop.told == ["goes on", "limits.max_updates=2"] and trainer.should_stop


def loop_of(told: list[str], ended_by: str | None = None) -> tuple[RolloutLoop, SimpleNamespace]:
    """A loop whose parts say when they are called, and its trainer."""

    def says(word: str) -> Callable[..., None]:
        return lambda *arguments, **options: told.append(word)

    parts = SimpleNamespace(
        weight_sync=SimpleNamespace(sync=says("sync")),
        sampler=None,
        validation=SimpleNamespace(due=lambda *where: True, validate=says("validate")),
        rollout_log=SimpleNamespace(write=says("log")),
        checkpoint=SimpleNamespace(save_if_due=says("save")),
        preemption=SimpleNamespace(stop=says("stop")),
    )
    run = Run(Limits(), Ledger(), Bars(enabled=False))
    run.ended_by, run.told_to_stop = ended_by, "SIGTERM"
    trainer = SimpleNamespace(callbacks=[SimpleNamespace(on_boundary=says("own"))])
    loop = RolloutLoop(run, Data(), torch.nn.Linear(1, 1), Parts())
    loop.parts = parts
    return loop, trainer


def test_a_boundary_syncs_validates_logs_saves_and_stops_in_this_order():
    told = []
    loop, trainer = loop_of(told)
    loop.boundary(trainer)
    assert told == ["sync", "validate", "own", "log", "save", "stop"]


def test_a_run_that_has_ended_is_not_preempted():
    told = []
    loop, trainer = loop_of(told, ended_by="limits.max_updates=2")
    loop.boundary(trainer)
    assert told[-1] == "save"


def test_parts_act_in_the_order_of_the_loop_whatever_order_they_were_given_in():
    checkpoint, validation = Checkpoint("x"), Validation()
    names = {"checkpoint": checkpoint, "validation": validation}
    for order in (names, dict(reversed(names.items()))):
        assert Parts(**order).present == [validation, checkpoint]


def test_another_callback_under_the_name_of_a_part_is_refused():
    with pytest.raises(
        UserError, match="callbacks.checkpoint must be a rlzoo.callbacks.Checkpoint"
    ):
        Parts(checkpoint=Validation())
