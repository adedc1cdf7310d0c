"""GVM plans while the engine sleeps: nothing stands beside the logits that its norms take."""

from pathlib import Path

import pytest
import torch

from rlzoo.bench._equal import equal_but_time
from rlzoo.callbacks import gvm
from rlzoo.callbacks.weight_sync import WeightSync
from rlzoo.engines.transformers import TransformersEngine
from tests import warm

TWO_PLANS = (
    "sampler=gvm",
    "sampler.callback.pilots=2",
    "datamodule.max_response_tokens=24",
    "limits.max_responses=80",  # 16 pilots and 32 responses in the first epoch
    "engine=transformers",
)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the engine, in order; it forgets its weights in its sleep, as on a GPU."""
    told: list[str] = []

    def sleep(engine: TransformersEngine) -> None:
        told.append("sleep")
        engine.asleep, engine.version = True, -1
        for parameter in engine.model.parameters():
            parameter.data.fill_(torch.nan)

    def watched(owner: object, name: str, word: str) -> None:
        own = getattr(owner, name)

        def call(*arguments: object, **options: object) -> object:
            told.append(word)
            return own(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(TransformersEngine, "sleep", sleep)
    watched(TransformersEngine, "generate", "draw")
    watched(gvm, "gradient_norms", "norms")
    watched(WeightSync, "sync", "sync")
    return told


def test_the_engine_sleeps_while_norms_are_computed_and_the_plan_is_the_same(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
):
    warm.passed(tmp_path / "sleeps", *TWO_PLANS)
    plan, step, validation = ["draw", "sleep", "norms", "sync"], ["draw", "sleep", "sync"], ["draw"]
    assert told == ["sync", *validation, *plan, *step, *step, *plan, *step, *validation]
    monkeypatch.undo()
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch's own default
    warm.passed(tmp_path / "awake", *TWO_PLANS)
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not equal_but_time(*(tmp_path / name / "metrics.csv" for name in ("sleeps", "awake")))
