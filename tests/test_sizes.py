"""What goes with a model's size: steps, lengths, validation and checkpoints."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlzoo.callbacks import Validation
from rlzoo.callbacks.validation import SHARE
from rlzoo.data.prompts import FilePrompts
from rlzoo.errors import UserError
from rlzoo.launch.idle import SIZES
from rlzoo.launch.schema import check_settings
from rlzoo.loop import RolloutLoop
from tests import warm
from tests.test_configs import compose

HF = ("model=hf", "model.path=somewhere")


def sizes(*overrides: str) -> tuple:
    cfg = compose(*overrides)
    check_settings(cfg)
    data = cfg.datamodule
    return (
        data.prompts_per_epoch,
        data.responses_per_step,
        data.max_response_tokens,
        data.on_too_long,
        cfg.limits.max_responses,
        cfg.callbacks.validation.every,
        cfg.callbacks.checkpoint.every,
        cfg.model.gradient_checkpointing,
    )


def test_each_model_brings_its_sizes():
    assert sizes() == (64, 256, 96, "error", 9216, 8, 1, False)
    assert sizes(*HF) == (1024, 1024, 3072, "drop", None, "auto", None, "auto")


OWN = {
    "datamodule.prompts_per_epoch": 2048,
    "datamodule.responses_per_step": 4096,
    "datamodule.max_response_tokens": 512,
    "datamodule.on_too_long": "error",
    "limits.max_responses": 99,
    "val_every": 3,
    "callbacks.checkpoint.every": 5,
    "model.gradient_checkpointing": False,
}


def test_what_a_user_sets_wins_over_what_a_model_brings():
    assert sizes(*HF, *(f"{key}={value}" for key, value in OWN.items())) == tuple(OWN.values())


def test_what_an_experiment_sets_wins_over_what_a_model_brings(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    lines = ["# @package _global_", "defaults: [{override /model: hf}]", "model: {path: there}"]
    lines += ["datamodule: {prompts_per_epoch: 512, max_response_tokens: 256}", "val_every: 4"]
    lines += ["limits: {max_responses: 77}", "callbacks: {checkpoint: {every: 2}}"]
    (tmp_path / "experiment" / "mine.yaml").write_text("\n".join(lines))
    found = sizes("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert found == (512, 1024, 256, "drop", 77, 4, 2, "auto")
    beside = sizes("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]", "val_every=6")
    assert beside[5] == 6  # and the command line over both


def test_one_size_set_for_all_reaches_the_keys_that_read_it():
    cfg = compose(*HF, "sizes.max_response_tokens=2048")
    assert cfg.datamodule.max_response_tokens == cfg.algo.max_response_tokens == 2048


def test_a_model_that_brings_no_sizes_is_told_where_they_are():
    for gone in ("~sizes", "~sizes.max_prompt_tokens"):
        with pytest.raises(UserError, match="copy `sizes:` from conf/model/hf.yaml"):
            sizes(*HF, gone)


def test_every_size_has_its_key_in_the_refusal_of_idle_ones():
    assert set(SIZES) == set(compose(*HF).sizes) == set(compose().sizes)


# --- validation by its cost ----------------------------------------------------------------------


def data_of(prompts: int, **given: int) -> SimpleNamespace:
    numbers = {"responses_per_step": 1024, "steps_per_epoch": 8, "prompts_per_epoch": 1024}
    params = SimpleNamespace(max_response_tokens=3072)
    return SimpleNamespace(
        val_prompts=[None] * prompts, val_responses=8, params=params, **(numbers | given)
    )


@pytest.mark.parametrize("pilots", [0, 4096])
@pytest.mark.parametrize("prompts", [1, 373, 512, 43_000])
def test_validation_is_at_most_a_tenth_of_what_is_drawn_and_no_rarer_than_that(prompts, pilots):
    data = data_of(prompts)
    every = Validation("auto").interval(data, pilots)

    def share(steps: int) -> float:
        cost = 8 * prompts
        return cost / (cost + steps * (1024 + pilots / 8))

    assert every >= 1 and share(every) <= SHARE
    assert every == 1 or share(every - 1) > SHARE


def test_validation_is_due_at_its_interval_and_at_the_end():
    data = data_of(512, rollout_step=24)
    assert Validation("auto").interval(data, 4096) == 24
    assert Validation("auto").due(data, ended=False, pilots=4096)
    data.rollout_step = 25
    assert not Validation("auto").due(data, ended=False, pilots=4096)
    assert Validation("auto").due(data, ended=True, pilots=4096)
    assert not Validation(0).due(data, ended=False)


def test_the_costs_of_a_step_a_plan_and_a_validation_are_said_in_a_line():
    parts = SimpleNamespace(validation=Validation("auto"), sampler=SimpleNamespace(pilots=4))
    loop = RolloutLoop.__new__(RolloutLoop)
    loop.data, loop.parts = data_of(512), parts
    assert loop.costs() == (
        "A rollout step draws 1,024 responses (up to 3,145,728 tokens), a plan, every 8 steps,"
        " 4,096, a validation, every 24 steps, 4,096."
    )


def test_a_seeded_choice_of_the_validation_prompts_is_validated_on(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"question": "{i}?", "answer": "{i}"}}\n' for i in range(400)))

    def ids(split: str, **given: int | None) -> list[str]:
        source = FilePrompts(str(file), "question", "answer", val_fraction=0.5, **given)
        return [prompt.id for prompt in source.load(split)]

    every, some = ids("val"), ids("val", val_prompts=20)
    assert len(every) > 100 and len(some) == 20
    assert [i for i in every if i in some] == some and some != every[:20]
    assert some == ids("val", val_prompts=20) != ids("val", val_prompts=20, seed=1)
    assert ids("train", val_prompts=20) == ids("train")
    assert ids("val", val_prompts=20, max_prompts=5) == ids("val", max_prompts=5)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_seconds(tmp_path_factory) -> Path:
    """A run of two rollout steps whose checkpoints no count of steps asks for."""
    folder = tmp_path_factory.mktemp("run")
    seldom = ("callbacks.checkpoint.every=null", "callbacks.checkpoint.every_seconds=9999.0")
    warm.passed(folder, *seldom, "val_every=1")
    return folder


def test_the_best_is_kept_as_weights_alone_and_the_end_is_saved_whole(by_seconds: Path):
    folder = by_seconds / "checkpoints"
    best = torch.load(folder / "best.ckpt", weights_only=True)
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert (folder / "last.ckpt").resolve().name == "step_000002.ckpt"
    assert "optimizer_states" in last and "optimizer_states" not in best
    assert (folder / "best.ckpt").stat().st_size < 0.6 * (folder / "last.ckpt").stat().st_size
    assert best["state_dict"].keys() == last["state_dict"].keys()
    assert not list(folder.glob("step_000001.ckpt"))


def test_weights_alone_begin_other_runs_and_are_no_exact_resume(by_seconds: Path, tmp_path: Path):
    best = by_seconds / "checkpoints" / "best.ckpt"
    said = warm.refused(tmp_path / "a", f"ckpt_path={best}", "limits.max_responses=64")
    assert "holds weights alone" in said and "resume=weights" in said
    warm.passed(tmp_path / "b", f"init_from={best}", "limits.max_responses=16")
    resumed = (f"ckpt_path={best}", "resume=weights", "limits.max_responses=64")
    warm.passed(tmp_path / "c", *resumed)
    rows = (tmp_path / "c" / "metrics.csv").read_text().splitlines()
    assert len(rows) > 3
