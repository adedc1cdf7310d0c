"""Bad input: one clear message that names the mend, no stack trace, exit code 2."""

import errno
import json
import shutil
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from rlzoo.errors import UserError
from rlzoo.launch.configuration import check_overrides, conf_dir
from rlzoo.launch.run_dir import claim, find_checkpoint
from rlzoo.launch.training import build
from rlzoo.report.progress import Bars
from rlzoo.run import explain
from tests.test_runs import finish, start

ROOT = Path(__file__).parents[1]
TINY = ROOT / "rlzoo" / "models" / "tiny"


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose("train", overrides=list(overrides))


def fail(*overrides: str) -> str:
    """What a run would say of these overrides before it draws anything."""
    cfg = None
    try:
        check_overrides(overrides)
        cfg = compose(*overrides)
        loop, _ = build(cfg, Bars(enabled=False))
        loop.data.setup("fit")
    except Exception as error:
        message = explain(error, cfg)
        assert message is not None, f"not explained: {error!r}"
        return " ".join(message.split())
    raise AssertionError(f"{overrides} were accepted")


def test_a_mistake_costs_exit_code_2_and_no_stack_trace(tmp_path):
    output = finish(start(tmp_path / "run", "sampler.allocator.beta=1"), expected=2)
    assert "sampler.allocator.beta must be a number, at least 2, got 1" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "override, words",
    [
        ("algo=grpoo", ["grpoo", "algo=grpo", "raft_pp"]),
        ("algo.clip_lo=0.1", ["algo.clip_lo", "algo.clip_low=0.1"]),
        ("+algo.bogus=1", ["bogus"]),
        ("algo.clip_low=1.5", ["algo.clip_low", "1.5", "above 0, below 1"]),
        ("datamodule.responses_per_step=100", ["responses_per_step=100", "multiple"]),
        ("data.families=[sums,sorcery]", ["data.families", "sorcery"]),
        ("limits.max_responses=0", ["limits.max_responses", "0"]),
        ("sampler.allocator.beta=1", ["beta", "at least 2"]),
        ("data=jsonl data.path=nowhere.jsonl", ["data.path", "nowhere.jsonl"]),
        ("model.path=./nowhere", ["model.path", "./nowhere"]),
        ("model.path=tests", ["model.path", "config.json"]),
        ("datamodule.max_prompt_tokens=5", ["max_prompt_tokens"]),
    ],
)
def test_a_wrong_value_fails_at_start_up_with_the_mend(tmp_path, override, words):
    message = fail(f"run_dir={tmp_path}", *override.split())
    for word in words:
        assert word in message, message


def test_a_run_directory_is_used_by_one_run_at_a_time(tmp_path):
    lock = claim(tmp_path, resuming=False)
    with pytest.raises(UserError, match="in use by another process"):
        claim(tmp_path, resuming=True)
    lock.close()
    claim(tmp_path, resuming=True).close()


def test_a_run_directory_with_a_run_in_it_is_resumed_or_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="already holds a run.*ckpt_path=last"):
        claim(tmp_path, resuming=False)
    claim(tmp_path, resuming=True).close()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint at .*last.ckpt"):
        find_checkpoint("last", tmp_path)


def test_a_corrupt_checkpoint_is_named(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="last.ckpt is damaged"):
        find_checkpoint("last", tmp_path)


def test_a_full_disk_is_explained():
    error = OSError(errno.ENOSPC, "No space left on device")
    assert "ckpt_path=last" in explain(error, compose("run_dir=somewhere"))


@pytest.mark.parametrize(
    "missing, word", [("chat_template", "chat template"), ("eos_token", "end")]
)
def test_a_tokenizer_that_cannot_serve_is_named(tmp_path, missing, word):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    if missing == "chat_template":
        (model / "chat_template.jinja").unlink()
    else:
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["eos_token"] = None
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    message = fail(f"run_dir={tmp_path / 'run'}", f"model.path={model}")
    assert "model.path" in message and word in message
