"""What may change when a run is resumed, and what is refused: by name, with the mend."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from rlzoo.data.fingerprint import files_differ, of_files, of_pairs, of_prompts, prompts_differ
from rlzoo.errors import UserError
from rlzoo.export import run_config
from rlzoo.launch.configuration import conf_dir
from rlzoo.launch.resuming import check_changes, differences, record_of
from rlzoo.launch.summary import read_metrics
from rlzoo.models.loading import TINY
from rlzoo.types import Prompt
from tests import warm
from tests.test_ends import contents


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose("train", ["run_dir=somewhere", *overrides])


BEGUN = ("algo=grpo", "sampler=gvm", "engine=transformers")


@pytest.fixture(scope="module")
def saved() -> dict:
    record = record_of(compose(*BEGUN))
    return {"RolloutDataModule": {"ledger": {}, "rollout_step": 1, "record": record}}


def changes(saved: dict, *overrides: str, exact: bool = True) -> list[str]:
    return check_changes(compose(*BEGUN, *overrides), Path("step_000001.ckpt"), saved, exact)


def refused(saved: dict, *overrides: str, exact: bool = True) -> str:
    with pytest.raises(UserError) as error:
        changes(saved, *overrides, exact=exact)
    return str(error.value)


FIXED = (  # key=value, and what is listed
    ("seed=1", "seed: 0 -> 1"),
    ("algo=raft", "algo._target_: rlzoo.algos.GRPO -> rlzoo.algos.RAFT"),
    (
        "sampler=uniform",
        "sampler.allocator._target_: rlzoo.allocators.GVMBudgets -> rlzoo.allocators.Uniform",
    ),
    ("sampler.callback.pilots=8", "sampler.callback.pilots: 4 -> 8"),
    ("datamodule.responses_per_step=128", "datamodule.responses_per_step: 256 -> 128"),
    ("datamodule.prompts_per_epoch=32", "datamodule.prompts_per_epoch: 64 -> 32"),
    ("init_from=other", "init_from: null -> other"),
)
WITH_WEIGHTS = (
    ("lr=1", "lr: 0.0001 -> 1"),
    ("algo.optimizer.lr=1", "algo.optimizer.lr: 0.0001 -> 1"),
    ("algo.kl_coef=0.1", "algo.kl_coef: 0.0 -> 0.1"),
    ("algo.updates=2", "algo.updates: 4 -> 2"),
    ("algo.optimizer._target_=torch.optim.SGD", "torch.optim.AdamW -> torch.optim.SGD"),
    (
        "algo.scheduler=null",
        "algo.scheduler: transformers.get_constant_schedule_with_warmup -> null",
    ),
    ("datamodule.temperature=0.5", "datamodule.temperature: 1.0 -> 0.5"),
    ("datamodule.max_response_tokens=64", "datamodule.max_response_tokens: 96 -> 64"),
    ("trainer.precision=bf16-mixed", "trainer.precision: 32-true -> bf16-mixed"),
    ("trainer.gradient_clip_val=2", "trainer.gradient_clip_val: 1.0 -> 2"),
    ("model.dtype=bfloat16", "model.dtype: float32 -> bfloat16"),
    ("reward.truncated_is_wrong=true", "reward.truncated_is_wrong: False -> True"),
)
FREE = (
    "limits.max_responses=99999",
    "limits.max_tokens=5",
    "val_every=1",
    "logger=csv",
    "callbacks.checkpoint.every=3",
    "callbacks.preemption=null",
    "callbacks.rank_watch.patience=60",
    "datamodule.val_responses=4",
    "run_dir=elsewhere",
    "debug=true",
    "trainer.max_epochs=3",
    "reward.num_workers=4",
    "strategy=ddp",
    "model.gradient_checkpointing=true",
)


@pytest.mark.parametrize("override, line", FIXED + WITH_WEIGHTS)
def test_what_a_resumed_run_could_not_heed_is_refused(saved, override, line):
    message = refused(saved, override)
    assert f"\n  {line}" in message or line in message
    assert message.count(" -> ") == 1 or "_target_" in message
    if (override, line) in FIXED:
        assert "resume=weights" not in message
        assert line in refused(saved, override, exact=False)
    else:
        assert "resume=weights" in message
        changes(saved, override, exact=False)


def test_all_of_it_is_listed_once_however_many_keys_follow(saved):
    message = refused(saved, "lr=1", "seed=3", "datamodule.temperature=0.5")
    assert {line.split(":")[0] for line in message.splitlines()[1:-1]} == {
        "  lr",
        "  seed",
        "  datamodule.temperature",
    }


def test_what_may_change_does(saved):
    assert changes(saved, *FREE) == []
    (line,) = changes(saved, "num_threads=2", "model.attention=eager")
    assert "num_threads: null -> 2" in line and "up to rounding" in line


def test_keys_that_only_one_version_has_are_no_difference_unless_someone_gave_them():
    before = OmegaConf.to_container(compose(), resolve=True)
    before["algo"]["an_old_key"] = 3
    del before["algo"]["entropy_coef"]
    assert differences(before, compose(), [], []) == {}
    assert differences(
        before, compose(), ["+algo.an_old_key=3"], ["algo.entropy_coef=0.0"]
    ).keys() == {
        "algo.an_old_key",
        "algo.entropy_coef",
    }


def test_another_model_of_the_same_shape_is_told_and_a_moved_one_is_not(saved, tmp_path):
    shutil.copytree(TINY, tmp_path / "moved")
    assert changes(saved, f"model.path={tmp_path / 'moved'}") == []
    weights = tmp_path / "moved" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-3] ^= 1
    weights.write_bytes(whole)
    for exact in (True, False):
        assert "is not the one of then" in refused(
            saved, f"model.path={tmp_path / 'moved'}", exact=exact
        )


# --- data ---------------------------------------------------------------------------------------


def prompts(answer: str = "4", tokens: Sequence[int] = (1, 2)) -> list[Prompt]:
    return [
        Prompt("a", "2+2", answer, token_ids=tuple(tokens)),
        Prompt("b", "3+3", "6", token_ids=(3,)),
    ]


@pytest.mark.parametrize(
    "now, words",
    [
        (prompts()[:1], "there were 2 training prompts, now there are 1"),
        ([prompts()[0], Prompt("c", "3+3", "6", token_ids=(3,))], "other ids"),
        (prompts()[::-1], "another order"),
        (prompts(answer="5"), "an edited file"),
        (prompts(tokens=(2, 1)), "another tokenizer, chat template"),
        (prompts(tokens=(1, 2, 0)), "another tokenizer, chat template"),
    ],
)
def test_a_fingerprint_says_in_what_prompts_differ(now, words):
    assert prompts_differ(of_prompts(prompts()), of_prompts(prompts()), "training") is None
    assert words in prompts_differ(of_prompts(prompts()), of_prompts(now), "training")


def test_texts_that_run_together_are_told_apart():
    one, other = [Prompt("i", "ab", "c")], [Prompt("i", "a", "bc")]
    assert of_prompts(one)["texts"] != of_prompts(other)["texts"]
    assert of_pairs([("ab", "c")]) != of_pairs([("a", "bc")])


def test_files_may_follow_and_not_be_others(tmp_path):
    for i in range(3):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 200_000)
    digests = of_files(tmp_path / str(i) for i in range(3))
    assert files_differ(digests[:2], digests) is None
    assert "file 1 of replay=" in files_differ(digests[:2], [digests[0], digests[2]])
    assert "replay= is set" in files_differ(None, digests)
    assert "it would draw" in files_differ(digests, None)


# --- whole runs ---------------------------------------------------------------------------------

# One rollout step of 16 responses from 8 of the prompts of a file: inside an epoch.
SMALL = tuple(option for option in warm.SMALL if not option.startswith(("data.", "limits.")))


def options(folder: Path, name: str = "data", model: str = "tiny") -> tuple[str, ...]:
    data = ("data=jsonl", f"data.path={folder / name}.jsonl", "data.val_fraction=0.2")
    plain = ("data.template.system=null", "data.template.user_suffix=''", f"model.path={model}")
    return (*SMALL, *data, *plain, "limits.max_responses=16")


def write_data(path: Path, answer: int = 2) -> None:
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(16)]
    rows[5]["answer"] = str(answer)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changes")
    write_data(folder / "data.jsonl")
    warm.passed(folder / "run", *options(folder), small=False)
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_other_data_are_refused_and_leave_everything_as_it_was(folder):
    write_data(folder / "edited.jsonl", answer=3)
    model = folder / "model"
    shutil.copytree(TINY, model)
    template = model / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + "Hm. " + template.read_text())
    before = contents(folder / "run")
    more = ("ckpt_path=last", "limits.max_responses=32")
    for other, words in (
        (options(folder, "edited"), "another question, answer or solution"),
        ((*options(folder), "data.template.user_prefix=Please."), "rendered to other tokens"),
        (options(folder, model=str(model)), "rendered to other tokens"),
        ((*options(folder), "seed=1"), "seed: 0 -> 1"),
        ((*options(folder), "datamodule.responses_per_step=8"), "responses_per_step: 16 -> 8"),
    ):
        message = warm.refused(folder / "run", *other, *more, small=False)
        assert words in message and "init_from=CHECKPOINT" in message
    assert contents(folder / "run") == before


def test_what_a_run_was_begun_with_stays_and_what_may_change_takes_effect(folder):
    run_dir = folder / "run"
    begun = {name: (run_dir / name).read_bytes() for name in ("config.yaml", "environment.json")}
    (folder / "data.jsonl").rename(folder / "moved.jsonl")
    (run_dir / "metrics.csv").write_text("opened;and;saved\n")
    more = ("ckpt_path=auto", "limits.max_responses=32", "logger=default", "val_every=1")
    warm.passed(
        run_dir, *options(folder, "moved"), *more, "datamodule.val_responses=1", small=False
    )
    assert begun == {name: (run_dir / name).read_bytes() for name in begun}
    second = OmegaConf.load(run_dir / "config.resume-1.yaml")
    assert second.limits.max_responses == 32 and (run_dir / "environment.resume-1.json").exists()
    rows = read_metrics(run_dir / "metrics.csv")
    assert [row["rollout_step"] for row in rows] == ["0", "1", "2"]
    assert rows[1]["val/avg_at_2"] and rows[2]["val/avg_at_1"] and not rows[2]["val/avg_at_2"]
    assert list((run_dir / "tensorboard").iterdir())
    (run_dir / "config.yaml").unlink()
    checkpoint = (run_dir / "checkpoints" / "last.ckpt").resolve()
    assert run_config(checkpoint).model.path == "tiny"  # the checkpoint says so itself
    shutil.rmtree(run_dir / "tensorboard")
    limit = "limits.max_responses=48"
    warm.passed(run_dir, *options(folder, "moved"), *more, limit, "logger=none", small=False)
    assert OmegaConf.load(run_dir / "config.yaml").limits.max_responses == 32  # of the checkpoint
    assert (run_dir / "config.resume-2.yaml").exists()


@pytest.mark.slow
def test_another_runs_checkpoint_branches_and_never_writes_over_a_run(folder):
    checkpoint = folder / "run" / "checkpoints" / "step_000001.ckpt"
    more = (f"ckpt_path={checkpoint}", "limits.max_responses=32")
    before = contents(folder / "run")
    branch = folder / "branch"
    warm.passed(branch, *options(folder), *more, small=False)
    assert contents(folder / "run") == before
    assert [row["rollout_step"] for row in read_metrics(branch / "metrics.csv")] == ["0", "1", "2"]
    assert not (branch / "config.resume-1.yaml").exists()
    message = warm.refused(branch, *options(folder), *more, small=False)
    assert "of another run than the one in run_dir" in message


@pytest.mark.slow
def test_a_checkpoint_without_record_or_fingerprint_goes_on(folder):
    """As versions of before wrote them; config.yaml is what it is compared with."""
    run_dir = folder / "run"
    path = (run_dir / "checkpoints" / "last.ckpt").resolve()
    state = torch.load(path, map_location="cpu", weights_only=True)
    del state["RolloutDataModule"]["fingerprint"]
    state["RolloutDataModule"]["ledger"] = state["callbacks"].pop("Loop")["ledger"]
    own = state["callbacks"]["Checkpoint"]
    own["loggers"] = [
        {name: x for name, x in s.items() if name != "cells"} for s in own["loggers"].values()
    ]
    torch.save(state, path)
    more = ("ckpt_path=last", "limits.max_responses=32")
    assert "lr: 0.0001 -> 1" in warm.refused(run_dir, *options(folder), *more, "lr=1", small=False)
    warm.passed(run_dir, *options(folder), *more, small=False)
    assert len(read_metrics(run_dir / "metrics.csv")) == 3
