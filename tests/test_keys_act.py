"""Every key of conf/ reaches what it is about: another value builds another thing, or is refused.

(The keys of algorithms are walked by the tests of algorithms, Lightning's by test_idle.py.)
"""

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import rlzoo.report.trackers
import rlzoo.strategies.deepspeed
from rlzoo.allocators import Uniform
from rlzoo.errors import UserError
from rlzoo.launch.configuration import conf_dir
from rlzoo.launch.schema import HYDRA, TOP, check_settings, is_node, signature_of
from rlzoo.launch.trainer_keys import ARGUMENTS
from rlzoo.values import fits
from tests.test_values import compose

GIVEN = {  # by argument: what a run hands over, which no key says
    "source": SimpleNamespace(),
    "tokenizer": SimpleNamespace(),
    "engine": SimpleNamespace(),
    "reward": lambda prompts, texts, truncated: None,
    "allocator": Uniform(),
    "eos_token_ids": [0],
    "pad_token_id": 0,
}
NODES = {  # key: how it is chosen
    "reward": (),
    "engine.transformers": (),
    "engine.vllm": (),
    "engine": ("engine=vllm_server", "engine.addresses=[http://localhost:8000]"),
    "datamodule": (),
    "data": (),
    "strategy": ("strategy=deepspeed_zero3",),
    "logger.csv": (),
    "logger.tensorboard": (),
    "logger.wandb": ("logger=wandb",),
    "logger.mlflow": ("logger=mlflow",),
    "sampler.allocator": ("sampler=gvm",),
    "sampler.callback": ("sampler=gvm",),
    "model": (),
}
MORE = {  # keys that are chosen otherwise
    "sampler.allocator#dynamic": ("sampler=dynamic",),
    "engine#process": ("engine=transformers_process",),
    "strategy#ddp": ("strategy=ddp",),
    "strategy#fsdp": ("strategy=fsdp",),
    "datamodule#sft": ("algo=sft", "limits.max_updates=9"),
    "data#jsonl": ("data=jsonl", "data.path=setup.cfg"),
}
OTHER = {  # where no other value can be guessed
    "model.path": "elsewhere/nowhere/at/all",
    "model.init_from": "nowhere/at/all/to/be/found",
    "model.attention": "eager",
    "model.lora": {"r": 4},
    "engine.vllm.options": {"block_size": 16},
    "engine.vllm.gpu_memory_share": 0.5,
    "engine.transformers.max_rows": 8,
    "engine.max_rows": 8,
    "reward.num_workers": 3,
    "callbacks.rank_watch.patience": 60.0,
    "engine.vllm.kv_cache_dtype": "fp8",
    "engine.folder": "/",
    "engine.addresses": ["http://localhost:9"],
    "engine.transformers.device": "meta",
    "strategy.options": {"sub_group_size": 1},
    "data.families": ["sums"],
    "data.levels": [2],
    "data.file_format": "parquet",
    "data.answer_format": "boxed",
    "data.on_bad_row": "skip",
    "datamodule.replay": "nowhere/at/all",
    "datamodule.corpus": [["1 + 1?", "2"]],
    "datamodule.rollouts": "nowhere/at/all",
    "datamodule.responses_per_step": 512,
    "sampler.allocator.beta": 3.0,
}
QUIET = {  # what cannot be seen from here, and why
    "model.trust_remote_code": "the model of these tests brings no code",
    "engine.vllm.chunked_prefill": "is CUDA's: rlzoo.launch.idle says so",
    "engine.vllm.sleep_level": "is CUDA's: rlzoo.launch.idle says so",
    "engine.vllm.enforce_eager": "is CUDA's: rlzoo.launch.idle says so",
    "engine.trust_remote_code": "the model of these tests brings no code",
    "datamodule.allow_truncated_sampling": "is a permission for top_p and top_k",
}


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(rlzoo.report.trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(rlzoo.strategies.deepspeed, "import_deepspeed", lambda *stage: None)


@pytest.mark.parametrize("name", [*NODES, *MORE])
def test_another_value_of_every_key_builds_another_thing_or_is_refused(name):
    key = name.partition("#")[0]
    cfg = compose(*(NODES | MORE)[name])
    silent = walk(cfg, key)
    assert [found for found in silent if found not in QUIET] == []


@pytest.mark.parametrize("choice", ["rollouts", "sft"])
def test_another_value_of_every_callbacks_key_makes_another_callback(choice):
    cfg = compose(*(("algo=sft", "limits.max_updates=9") if choice == "sft" else ()))
    silent = [key for name in cfg.callbacks for key in walk(cfg, f"callbacks.{name}")]
    assert silent == []


def walk(cfg: DictConfig, key: str) -> list[str]:
    """The keys of a node, and of nodes in it, another value of which changes nothing."""
    node = OmegaConf.select(cfg, key)
    target = get_object(node._target_)
    arguments = signature_of(target).arguments
    silent, first = [], seen(built(node, target))
    for name in node:
        if name in HYDRA:
            continue
        place = f"{key}.{name}"
        if is_node(node[name]):
            if isinstance(node._get_node(name), DictConfig) and not node[name].get("_partial_"):
                silent += walk(cfg, place)
            continue
        value = OTHER[place] if place in OTHER else other(arguments[name], node[name])
        changed = (
            OmegaConf.merge(node, {name: value}) if not isinstance(value, dict) else node.copy()
        )
        if isinstance(value, dict):
            changed[name] = value
        changed._set_parent(node._get_parent())
        try:
            if seen(built(changed, target)) == first:
                silent.append(place)
        except (UserError, InstantiationException) as error:
            assert isinstance(error.__cause__ or error, UserError), (place, value, error)
    return silent


def built(node: DictConfig, target: Any) -> Any:
    takes = signature_of(target).arguments
    handed = {name: value for name, value in GIVEN.items() if name in takes}
    if "tokenizer" in takes and "source" not in takes:
        handed = {"tokenizer": GIVEN["tokenizer"]}
    made = instantiate(node, **handed)
    return made() if node.get("_partial_") and target.__name__ == "load_policy" else made


def other(annotation: Any, value: Any) -> Any:
    """Another value that fits."""
    base = value if value is not None else 1
    tries: list[Any] = [not base] if isinstance(base, bool) else []
    if isinstance(base, int | float):
        tries += [base * 2, base + 1, base / 2, 0.5]
    for part in [annotation, *typing.get_args(annotation)]:
        tries += [choice for choice in typing.get_args(part) if isinstance(choice, str | int)]
    tries += ["other", ["other"], [3], {"other": 1}]
    return next(found for found in tries if found != value and fits(annotation, found))


def seen(thing: Any, depth: int = 0) -> Any:
    """All that tells one object from another built alike."""
    if isinstance(thing, nn.Module):
        config = getattr(thing, "config", SimpleNamespace())
        weights = [(n, str(p.dtype), p.requires_grad) for n, p in thing.named_parameters()]
        flags = [getattr(module, "gradient_checkpointing", None) for module in thing.modules()]
        return str(weights), str(flags), str(getattr(config, "_attn_implementation", None))
    if isinstance(thing, torch.Tensor | str | int | float | bool | Path) or thing is None:
        return str(thing)
    if depth > 4:
        return type(thing).__name__
    if isinstance(thing, Mapping):
        return {str(name): seen(value, depth + 1) for name, value in thing.items()}
    if isinstance(thing, tuple | list | set):
        return [seen(value, depth + 1) for value in thing]
    if hasattr(thing, "func"):  # a partial
        return [seen(thing.func, depth + 1), seen(thing.keywords, depth + 1)]
    if hasattr(thing, "total_seconds"):
        return thing.total_seconds()
    return {name: seen(value, depth + 1) for name, value in getattr(thing, "__dict__", {}).items()}


def test_every_key_of_train_yaml_is_read():
    """By the code, or by a setting that has it as ${key}."""
    code = "".join(path.read_text() for path in Path(rlzoo.__file__).parent.rglob("*.py"))
    conf = "".join(path.read_text() for path in conf_dir().rglob("*.yaml"))
    for key in TOP:
        assert re.search(rf"cfg\.{key}\b", code) or f"${{{key}}}" in conf, key


def test_every_group_is_walked():
    """A new group, or a new callback, is walked too or has a reason not to be."""
    walked = {name.partition("#")[0].partition(".")[0] for name in [*NODES, *MORE]}
    elsewhere = {"algo", "callbacks", "trainer", "experiment"}
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} == walked | elsewhere
    check_settings(compose())
    assert set(compose().trainer) - {"_target_"} <= set(ARGUMENTS)
