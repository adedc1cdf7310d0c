"""Every way a run can end closes it, and a run that has ended is left alone: as a user meets it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rlzoo.bench._equal import equal_but_time
from rlzoo.callbacks import Checkpoint
from rlzoo.errors import UserError
from rlzoo.export import export
from rlzoo.launch.run_dir import claim, find_checkpoint
from rlzoo.launch.summary import read_metrics
from rlzoo.models.finite import not_finite
from rlzoo.models.loading import TINY
from tests import warm

ONE_STEP = "limits.max_responses=16"
SFT = (
    "algo=sft",
    "model=tiny",
    "data.num_train=16",
    "data.num_val=4",
    "datamodule.batch_size=4",
    "datamodule.updates_per_step=1",
    "logger=csv",
    "num_threads=1",
    "lr=1e-4",
)


def contents(run_dir: Path) -> dict[str, bytes | str]:
    """Everything in a run directory but its log, links as what they point to."""
    return {
        str(path.relative_to(run_dir)): path.readlink().name
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(run_dir.rglob("*"))
        if (path.is_file() or path.is_symlink()) and path.name != "log.txt"
    }


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rollout step that has ended."""
    run_dir = tmp_path_factory.mktemp("ends") / "one_step"
    warm.passed(run_dir, ONE_STEP)
    return run_dir


@pytest.fixture
def copy(one_step: Path, tmp_path: Path) -> Path:
    shutil.copytree(one_step, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


# --- a run that has ended -----------------------------------------------------------------------


def test_a_run_that_has_ended_is_left_as_it_is(copy):
    before = contents(copy)
    for ckpt_path, limit in (
        ("auto", ONE_STEP),
        ("last", "limits.max_responses=3"),
        ("auto", "limits.max_updates=1"),
    ):
        output = warm.passed(copy, limit, f"ckpt_path={ckpt_path}")
        assert output.count("\n") == 1 and "nothing left to do" in output
        assert f"raise {limit.partition('=')[0]}" in output
    assert contents(copy) == before


FOREIGN = (
    "rollouts/notes.parquet",
    "rollouts/step_000000_copy.parquet",
    "budgets/mine_1.parquet",
    "checkpoints/step_000001_good.ckpt",
    "checkpoints/step_best.ckpt",
    "checkpoints/download.partial",
    "policy/notes.txt",
)


def test_a_raised_limit_goes_on_as_if_it_had_been_so_and_foreign_files_stay(copy, tmp_path):
    for name in FOREIGN:
        (copy / name).write_text("mine")
    warm.passed(copy, "ckpt_path=auto")
    assert all((copy / name).read_text() == "mine" for name in FOREIGN)
    warm.passed(tmp_path / "whole")
    assert read_metrics(copy / "metrics.csv")[1]["val/avg_at_2"]  # it had ended there
    ours, theirs = (
        load_file(run_dir / "policy" / "model.safetensors")
        for run_dir in (copy, tmp_path / "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    differ = equal_but_time(copy / "metrics.csv", tmp_path / "whole" / "metrics.csv")
    assert all("/val" in line or "val/" in line for line in differ), differ


def test_an_end_that_was_cut_short_is_completed(copy):
    expected = load_file(copy / "policy" / "model.safetensors")
    shutil.rmtree(copy / "policy")
    (copy / "summary.json").unlink()
    output = warm.passed(copy, ONE_STEP, "ckpt_path=auto")
    assert "Validation avg@2 went from" in output and "nothing left to do" in output
    found = load_file(copy / "policy" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((copy / "summary.json").read_text())["stopped_by"] == ONE_STEP


@pytest.mark.slow
def test_a_replay_at_its_end_is_left_as_it_is_and_goes_on_with_more(one_step, tmp_path):
    folder = tmp_path / "rollouts"
    shutil.copytree(one_step / "rollouts", folder)
    (folder / "notes.parquet").write_text("of someone else's")
    run_dir, replay = tmp_path / "run", f"replay={folder}"
    warm.passed(run_dir, replay)
    before = contents(run_dir)
    assert "the end of replay=" in warm.passed(run_dir, replay, "ckpt_path=auto")
    assert contents(run_dir) == before
    shutil.copy(folder / "step_000000.parquet", folder / "step_000001.parquet")
    warm.passed(run_dir, replay, "ckpt_path=auto")
    assert json.loads((run_dir / "summary.json").read_text())["rollout_steps"] == 2


@pytest.mark.slow
def test_supervised_training_ends_and_goes_on_likewise(tmp_path):
    run_dir = tmp_path / "run"
    warm.passed(run_dir, *SFT, "limits.max_updates=1", "algo.scheduler=null", small=False)
    before = contents(run_dir)
    again = (*SFT, "ckpt_path=auto", "algo.scheduler=null")
    for limit in ("limits.max_updates=1",):
        output = warm.passed(run_dir, *again, limit, small=False)
        assert f"nothing left to do: the run in {run_dir} has reached {limit}" in output
    assert contents(run_dir) == before
    warm.passed(run_dir, *again, "trainer.max_epochs=2", "limits.max_updates=9", small=False)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["updates"], summary["stopped_by"]) == (2, "trainer.max_epochs=2")
    edited = "data.seed=1"
    message = warm.refused(run_dir, *again, "limits.max_updates=3", edited, small=False)
    assert "some examples are others" in message


# --- how a run ends -----------------------------------------------------------------------------


class StopsAtOnce(Callback):
    """Sets `should_stop` after the first microbatch, inside a rollout step."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = True


class StopsWithTheEpoch(Callback):
    """Sets `should_stop` where many callbacks do, after the last boundary of an epoch."""

    def on_train_epoch_end(self, trainer, *args):
        trainer.should_stop = True


def test_an_end_of_lightnings_closes_the_run(tmp_path):
    """`should_stop` inside a step waits for its boundary, after one for the next; without
    checkpoints the end stays."""
    own = "+callbacks.own._target_=tests.test_ends."
    for name, stopped_by, options in (
        ("epochs", "trainer.max_epochs=1", ["trainer.max_epochs=1", "callbacks.checkpoint=null"]),
        ("later", "trainer.should_stop", [f"{own}StopsWithTheEpoch"]),
        ("asked", "trainer.should_stop", [f"{own}StopsAtOnce"]),
    ):
        run_dir = tmp_path / name
        output = warm.passed(run_dir, *options, "limits.max_responses=1000")
        summary = json.loads((run_dir / "summary.json").read_text())
        rows = read_metrics(run_dir / "metrics.csv")
        assert summary["stopped_by"] == stopped_by
        assert (
            rows[-1]["val/avg_at_2"] and int(rows[-1]["rollout_step"]) == summary["rollout_steps"]
        )
        assert float(rows[-1]["val/avg_at_2"]) == summary["val_avg_at_2_last"]
        assert "Validation avg@2 went from" in output and (run_dir / "policy").is_dir()
    assert summary["rollout_steps"] == 1


# --- what the end needs -------------------------------------------------------------------------


def a_model(folder: Path, **generation: object) -> Path:
    shutil.copytree(TINY, folder)
    path = folder / "generation_config.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(own | generation))
    return folder


def test_a_generation_config_that_transformers_would_not_write_is_written(tmp_path):
    model = a_model(tmp_path / "model", do_sample=False, temperature=0.6)
    output = warm.passed(tmp_path / "run", f"model.path={model}", ONE_STEP)
    assert "generation_config.json contradicts itself" in output and "temperature" in output
    kept = json.loads((tmp_path / "run" / "policy" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.6 and not kept.get("do_sample", False)
    export((tmp_path / "run" / "checkpoints" / "last.ckpt").resolve(), tmp_path / "out")
    ours, theirs = (
        load_file(d / "model.safetensors") for d in (tmp_path / "run/policy", tmp_path / "out")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == kept


def test_what_cannot_be_saved_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("this tokenizer was made by hand")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
    message = warm.refused(tmp_path / "run", ONE_STEP)
    assert "made by hand" in message and "callbacks.export=null" in message
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_failure_at_the_end_loses_nothing_and_says_how_to_get_it(tmp_path, monkeypatch):
    run_dir, save = tmp_path / "run", PreTrainedModel.save_pretrained

    def full(policy, folder, state_dict=None, **kwargs):
        if state_dict:
            raise OSError(28, "No space left on device")
        save(policy, folder, state_dict=state_dict, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        message = warm.refused(run_dir, ONE_STEP)
    assert "No space left" in message
    assert f"python -m rlzoo.export {run_dir}/checkpoints/last.ckpt {run_dir}/policy" in message
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["responses"] == 16 and not summary["exported"]
    assert (run_dir / "learning.png").exists()
    warm.passed(run_dir, ONE_STEP, "ckpt_path=auto")
    assert (run_dir / "policy" / "model.safetensors").exists()


def test_a_policy_that_is_no_number_is_not_exported(one_step, tmp_path):
    checkpoint = tmp_path / "broken" / "checkpoints" / "step_000001.ckpt"
    checkpoint.parent.mkdir(parents=True)
    state = torch.load(
        (one_step / "checkpoints" / "last.ckpt"), map_location="cpu", weights_only=True
    )
    next(iter(state["state_dict"].values())).view(-1)[7] = float("inf")
    torch.save(state, checkpoint)
    with pytest.raises(UserError, match="holds NaN or inf"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_no_number_is_named(value):
    weights = {
        "a": torch.full((3, 3), 6e4, dtype=torch.float16),
        "b": torch.zeros(4),
        "c": torch.ones(2),
    }
    assert not_finite(weights.items()) is None
    weights["b"][2] = value
    assert not_finite(weights.items()) == "b"


# --- the run directory --------------------------------------------------------------------------


def test_a_directory_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere/run")):
        message = warm.refused(run_dir, ONE_STEP)
        assert f"run_dir={run_dir} cannot be made" in message
    (tmp_path / "run" / "summary.json").mkdir(parents=True)
    with pytest.raises(UserError, match="summary.json is a folder.*Move it away"):
        claim(tmp_path / "run", resuming=True)
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written to: .*lock"):
        claim(tmp_path / "locked", resuming=False)


@pytest.mark.parametrize("name", ["metrics.csv", "policy", "checkpoints", "rollouts"])
def test_a_directory_with_any_part_of_a_run_is_not_written_over(tmp_path, name):
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("a\n1\n")
    with pytest.raises(UserError, match=f"already holds a run .{name}"):
        claim(tmp_path, resuming=False)


@pytest.mark.parametrize("option", ["doctor=true", "callbacks.checkpoint.monitor=val/nothing"])
def test_a_start_that_trains_nothing_leaves_its_directory_for_another(tmp_path, option):
    assert warm.run(tmp_path, option).code == (0 if option == "doctor=true" else 2)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", "log.txt"}
    claim(tmp_path, resuming=False).close()


def test_a_checkpoint_is_found_where_the_link_to_the_last_is_not(copy, tmp_path):
    folder = copy / "checkpoints"
    step = (folder / "last.ckpt").resolve()
    (folder / "last.ckpt").unlink()
    assert find_checkpoint("last", copy)[0] == step
    (folder / "last.ckpt").symlink_to("step_000099.ckpt")
    assert find_checkpoint("auto", copy)[0] == step
    shutil.copy(step, folder / "kept_by_hand.ckpt")
    step.unlink()
    with pytest.raises(UserError, match="points to step_000099.ckpt, which is gone"):
        find_checkpoint("auto", copy)
    (folder / "last.ckpt").unlink()
    (folder / "kept_by_hand.ckpt").rename(step)
    step.rename(folder / "last.ckpt")  # as a copy that follows links has it
    assert find_checkpoint("last", copy)[0] == folder / "last.ckpt"


def test_a_link_to_the_last_that_a_copy_made_a_folder_is_a_link_again(tmp_path):
    checkpoint = Checkpoint(str(tmp_path), monitor=None)
    for path in (checkpoint.folder / "last.ckpt", checkpoint.folder / "step_000001.ckpt.partial"):
        path.mkdir(parents=True)
        (path / "shard").write_text("1")
    checkpoint.kept["step_000001.ckpt"] = []
    checkpoint.publish(checkpoint.folder / "step_000001.ckpt.partial")
    assert (checkpoint.folder / "last.ckpt").readlink().name == "step_000001.ckpt"


def test_no_empty_log_lies_beside_ours(one_step):
    assert not (one_step / "run.log").exists()
