"""docs/trust.md, where it says that nothing is run."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from rlzoo.models.loading import TINY
from rlzoo.rewards.math import verdict
from tests import warm


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A model directory that brings code along, which leaves a mark where it is run."""
    folder = shutil.copytree(TINY, tmp_path / "stranger")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    config |= {"model_type": "theirs", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM as TheirModel\n"
        "class TheirConfig(Qwen2Config):\n    model_type = 'theirs'\n"
    )
    return folder


@pytest.mark.parametrize("engine", ["transformers", "vllm", "vllm_server"])
def test_a_models_own_code_is_not_run_unless_it_is_asked_for(engine, stranger, tmp_path):
    servers = ["engine.addresses=[http://localhost:1]"] if engine == "vllm_server" else []
    model = ["model=hf", f"model.path={stranger}"]
    told = warm.refused(tmp_path / "run", f"engine={engine}", *servers, *model)
    assert "trust_remote_code" in told
    assert not (tmp_path / "mark").exists()


def test_nor_is_that_of_a_model_that_weights_are_taken_from(stranger, tmp_path):
    told = warm.refused(tmp_path / "run", "engine=transformers", f"init_from={stranger}")
    assert "trust_remote_code" in told
    assert not (tmp_path / "mark").exists()


def test_asked_for_it_is_run(stranger, tmp_path, monkeypatch):
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)
    AutoConfig.from_pretrained(stranger, trust_remote_code=True)
    assert (tmp_path / "mark").exists()  # so that the tests above could fail


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{__import__('pathlib').Path('MARK').touch()}",
        r"\boxed{\text{__import__('pathlib').Path('MARK').touch()}}",
        "The final answer is $1 + __import__('pathlib').Path('MARK').touch()$.",
        "The answer is 1 + __import__('pathlib').Path('MARK').touch()",
        "The answer is (1).__class__.__base__.__subclasses__()",
    ],
)
def test_an_answer_is_parsed_and_never_run(text, tmp_path):
    assert not verdict("7", text.replace("MARK", str(tmp_path / "mark")))
    assert not (tmp_path / "mark").exists()
