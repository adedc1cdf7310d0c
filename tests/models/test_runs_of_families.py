"""Whole runs of other families, and what a user is told where model and data do not fit."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlzoo.models.policy import load_policy, load_tokenizer
from tests import warm
from tests.models.families import saved

ROWS = 384  # of the embedding; the tiny tokenizer has fewer tokens
SMALL = [override for override in warm.SMALL if not override.startswith("reward.")]
ONE_STEP = [*SMALL, "model=hf", "limits.max_responses=16", "datamodule.max_response_tokens=16"]


def directory(folder: Path, family: str = "llama", **changes) -> Path:
    """A random model with the tokenizer of the tiny one."""
    sizes = {"vocab_size": ROWS, "max_position_embeddings": 256} | changes
    path = saved(folder, family, **sizes)
    load_tokenizer("tiny").save_pretrained(path)
    return path


def by_chance(folder: Path) -> list[str]:
    """Overrides of a reward that a random model earns now and then."""
    (folder / "conf" / "reward").mkdir(parents=True)
    reward = folder / "conf" / "reward" / "even.yaml"
    reward.write_text("_target_: tests.rewards.lengths.even\n")
    return [f"hydra.searchpath=[file://{folder / 'conf'}]", "reward=even"]


@pytest.mark.parametrize(
    "family, options",
    [("gemma2", ["algo=ppo"]), ("lfm2", ["model.lora={r: 2}"])],
)
def test_a_run_trains_resumes_and_exports_another_family(family, options, tmp_path):
    """Capped logits and a critic; a hybrid with adapters."""
    model, run = directory(tmp_path, family), tmp_path / "run"
    options = [f"model.path={model}", "lr=1e-2", *by_chance(tmp_path), *options]
    warm.passed(run, *ONE_STEP, *options, small=False)
    more = ("limits.max_responses=32", "ckpt_path=last")
    warm.passed(run, *ONE_STEP, *options, *more, small=False)
    exported, before = load_policy(str(run / "policy")), load_policy(str(model))
    pairs = zip(exported.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    own = AutoModelForCausalLM.from_pretrained(run / "policy")
    pairs = zip(exported.parameters(), own.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_does_not_fit_is_told_before_anything_is_drawn(tmp_path):
    short = directory(tmp_path, "gpt2", max_position_embeddings=100)
    said = warm.refused(tmp_path / "1", "model=hf", f"model.path={short}", "engine=transformers")
    assert "datamodule.max_prompt_tokens=1024" in said and "at most 100 tokens" in said
    headless = directory(tmp_path, "llama")
    weights = headless / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cut short" in warm.refused(tmp_path / "2", "model=hf", f"model.path={headless}")
    said = warm.refused(tmp_path / "3", "model=hf", f"model.path={short}", "model.dtype=float16")
    assert "model.dtype=float16" in said
    said = warm.refused(tmp_path / "4", "model=hf", f"model.path={directory(tmp_path, 'bert')}")
    assert "BertLMHeadModel" in said
    narrow = directory(tmp_path, "llama", vocab_size=16)
    assert "16 rows" in warm.refused(tmp_path / "5", "model=hf", f"model.path={narrow}")


def test_a_padding_token_outside_of_the_embedding_is_replaced(tmp_path, caplog):
    model = directory(tmp_path)
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_special_tokens({"pad_token": "<|filler|>"})
    tokenizer.add_tokens([f"<|more{i}|>" for i in range(ROWS)])
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    small = len(load_tokenizer("tiny"))
    assert config["vocab_size"] == ROWS > small
    (folder := tmp_path / "narrow").mkdir()
    narrow = directory(folder, vocab_size=small)
    tokenizer.save_pretrained(narrow)
    found = load_tokenizer(str(narrow))
    assert found.pad_token_id == found.eos_token_id < small
    assert "outside of the model's embedding" in caplog.text
    warm.passed(tmp_path / "run", *ONE_STEP, f"model.path={narrow}", small=False)
