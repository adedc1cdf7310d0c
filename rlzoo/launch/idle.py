"""Settings that somebody gave and that would do nothing in this run.

A default may lie idle: `sampler.*` under `algo=sft`. What was asked for may not, or a study varies
a number that no run has read. Most of what the command line has is refused; what depends on the
machine alone is a warning, so that one command serves a laptop and a node of GPUs, and so is what a
file of conf/experiment has, which may serve several algorithms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from rlzoo.data.sft import SFTDataModule
from rlzoo.engines.select import auto_engine, why_not_vllm
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.engines.vllm import VLLMEngine
from rlzoo.errors import UserError
from rlzoo.launch.configuration import leaves, overrides_given, plain
from rlzoo.launch.processes import is_first
from rlzoo.launch.targets import is_kind, target_of
from rlzoo.values import shown

log = logging.getLogger(__name__)


class Idle(NamedTuple):
    keys: str  # patterns of dotted keys, spaces between
    when: Callable[[DictConfig], bool]  # the configuration under which they do nothing
    why: str


def supervised(cfg: DictConfig) -> bool:
    return is_kind(target_of(cfg.datamodule), SFTDataModule)


def without(*names: str) -> Callable[[DictConfig], bool]:
    """Whether a node was left out, by null or by ~."""
    return lambda cfg: any(OmegaConf.select(cfg, name) is None for name in names)


def unread(key: str) -> Callable[[DictConfig], bool]:
    """Whether nothing has the value of a key of train.yaml's."""
    return lambda cfg: f"${{{key}}}" not in str(plain(cfg, resolve=False))


def engine_is(kind: type) -> Callable[[DictConfig], bool]:
    """Whether an engine is taken, as far as can be told before it starts."""

    def found(cfg: DictConfig) -> bool:
        node = cfg.engine
        if target_of(node) is auto_engine:
            node = node.transformers if why_not_vllm() else node.vllm
        return is_kind(target_of(node), kind)

    return found


def no_cuda(cfg: DictConfig) -> bool:
    return not torch.cuda.is_available()


SIZES = {  # of conf/model, and the key that reads each
    "prompts_per_epoch": "datamodule.prompts_per_epoch",
    "responses_per_step": "datamodule.responses_per_step",
    "max_prompt_tokens": "datamodule.max_prompt_tokens",
    "max_response_tokens": "datamodule.max_response_tokens",
    "max_solution_tokens": "datamodule.max_response_tokens of algo=sft",
    "on_too_long": "datamodule.on_too_long",
    "max_responses": "limits.max_responses",
    "val_every": "val_every",
    "checkpoint_every": "callbacks.checkpoint.every",
}
REFUSED = [
    Idle(
        "limits.max_responses limits.max_tokens",
        supervised,
        "algo=sft draws no responses. Use limits.max_updates or limits.max_seconds.",
    ),
    Idle(
        "engine.* sampler.* reward.* val_every replay doctor",
        supervised,
        "algo=sft draws and judges nothing.",
    ),
    Idle("pipeline", supervised, "algo=sft draws nothing."),
    Idle("pipeline", lambda cfg: bool(cfg.replay), "replay draws nothing."),
    Idle("val_every", without("callbacks.validation"), "callbacks.validation is left out."),
    Idle("doctor", without("callbacks.doctor"), "callbacks.doctor is left out."),
    Idle("doctor", lambda cfg: bool(cfg.replay), "replay draws nothing that could be compared."),
    Idle(
        "resume",
        lambda cfg: cfg.resume != "exact" and cfg.ckpt_path is None,
        "nothing is resumed. Add ckpt_path=last.",
    ),
    Idle("sizes.max_responses sizes.val_every", supervised, "algo=sft draws and judges nothing."),
    *(
        Idle(f"sizes.{name}", unread(f"sizes.{name}"), f"{key} is set itself, or not in this run.")
        for name, key in SIZES.items()
    ),
    Idle("lr", unread("lr"), "no setting reads it. Is it algo.optimizer.lr?"),
    Idle("critic_lr", unread("critic_lr"), "no setting reads it: only algo=ppo has a critic."),
    Idle(
        "data.val_fraction",
        lambda cfg: cfg.data.get("val_path") is not None,
        "data.val_path has the validation prompts.",
    ),
    Idle(
        "data.test_fraction",
        lambda cfg: cfg.data.get("test_path") is not None,
        "data.test_path has the test prompts.",
    ),
    Idle(
        "strategy.persistence_threshold",
        lambda cfg: cfg.strategy.get("stage") != 3,
        "parameters stay whole in stages 1 and 2. Take strategy=deepspeed_zero3.",
    ),
    Idle(
        "callbacks.checkpoint.keep_best",
        lambda cfg: OmegaConf.select(cfg, "callbacks.checkpoint.monitor") is None,
        "callbacks.checkpoint.monitor is null, so there is no best.",
    ),
    Idle(
        "callbacks.checkpoint.every_seconds",
        lambda cfg: OmegaConf.select(cfg, "callbacks.checkpoint.every") == 1,
        "callbacks.checkpoint.every=1 saves at every boundary. Set that to null.",
    ),
    Idle(
        "callbacks.weight_sync.probe_tolerance",
        engine_is(TransformersEngine),
        "engine=transformers is compared by a checksum of its weights.",
    ),
    Idle(
        "callbacks.weight_sync.probe_tolerance",
        lambda cfg: OmegaConf.select(cfg, "callbacks.weight_sync.check") == "never",
        "callbacks.weight_sync.check=never compares nothing.",
    ),
]
WARNED = [
    Idle("engine.vllm.*", engine_is(TransformersEngine), "engine=auto takes transformers here."),
    Idle("engine.transformers.*", engine_is(VLLMEngine), "engine=auto takes vLLM here."),
    Idle(
        "engine.gpu_memory_share engine.sleep_level engine.chunked_prefill engine.enforce_eager",
        no_cuda,
        "there is no CUDA device here.",
    ),
    Idle("datamodule.val_responses", without("callbacks.validation"), "nothing is validated."),
    Idle("data.num_test data.test_path", lambda cfg: True, "training reads no test prompts."),
]


NEUTRAL = {  # these ask for nothing either
    "algo.rejected": "zero",
    "algo.reward_scale": "zero_one",
    "pipeline": "none",
}


def check_idle(cfg: DictConfig, overrides: Sequence[str] | None = None) -> None:
    """Refuses, or warns of, settings that nothing would read.

    Args:
        overrides: of the command line; Hydra's own if None.

    Raises:
        UserError: the command line has such; one message for all.
    """
    found = []
    for key, value, given in asked(overrides):
        if rule := first(REFUSED, key, cfg):
            found.append((key, value, rule.why, given))
        elif rule := first(WARNED, key, cfg):
            found.append((key, value, rule.why, False))
    tell(found)


def check_idle_options(algo: Any, overrides: Sequence[str] | None = None) -> None:
    """The same for the algorithm's own, once it is built and says which are idle."""
    tell(
        (key, value, f"{why}.", given and refused)
        for key, value, given in asked(overrides)
        for idle, refused in ((algo.idle_options(), True), (algo.idle_on_policy(), False))
        for name, why in idle.items()
        if key == name or key.startswith(f"{name}.")
    )


def tell(found: Iterable[tuple[str, Any, str, bool]]) -> None:
    """Refuses or warns of (key, value, why, whether it is refused)."""
    problems = []
    for key, value, why, refused in found:
        value = value if isinstance(value, str) else shown(value)
        if refused:
            problems.append(f"{key}={value} would do nothing: {why} Leave it out.")
        elif is_first():
            log.warning("%s=%s does nothing: %s", key, value, why)
    if problems:
        raise UserError("\n".join(problems))


def first(rules: Sequence[Idle], key: str, cfg: DictConfig) -> Idle | None:
    for rule in rules:
        if any(fnmatch(key, pattern) for pattern in rule.keys.split()) and rule.when(cfg):
            return rule
    return None


def asked(overrides: Sequence[str] | None) -> Iterator[tuple[str, Any, bool]]:
    """(dotted key, value, whether the command line has it) of what was asked for.

    Null, false and 0 ask for nothing.
    """
    here = overrides_given() if overrides is None else overrides
    parsed = [OverridesParser.create().parse_override(text) for text in here]
    given = dict(
        leaf
        for one in parsed
        if not one.is_delete()
        for leaf in leaves(one.value(), one.key_or_group)
    )
    for key, value in (experiment_settings() | given).items():
        if value and value != NEUTRAL.get(key):
            yield key, value, key in given


def experiment_settings() -> dict[str, Any]:
    """What the file of conf/experiment that the run was started with sets, by dotted key."""
    if not HydraConfig.initialized():
        return {}
    runtime = HydraConfig.get().runtime
    for source in runtime.config_sources:
        path = Path(source.path) / "experiment" / f"{runtime.choices.get('experiment')}.yaml"
        if source.schema == "file" and path.is_file():
            return dict(leaves(OmegaConf.to_container(OmegaConf.load(path), resolve=False)))
    return {}
