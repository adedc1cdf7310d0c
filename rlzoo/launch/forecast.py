"""What a run will take of each device's memory, before anything starts, and what is settled by it:
`algo.tokens_per_microbatch`, `engine.gpu_memory_share` and `model.gradient_checkpointing`, where
they are auto. `rlzoo.models.memory` has the formulas."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from rlzoo.engines.select import auto_engine, why_not_vllm
from rlzoo.engines.shapes import empty_model
from rlzoo.engines.vllm import VLLMEngine
from rlzoo.errors import UserError
from rlzoo.launch.targets import is_kind, target_of
from rlzoo.models import memory
from rlzoo.models.loading import load_config
from rlzoo.models.lora import lora_settings, target_names
from rlzoo.models.memory import Held, Setting, Shape
from rlzoo.strategies import FSDP, DeepSpeed

log = logging.getLogger(__name__)

FILE = "forecast.json"
MOST_TOKENS = {"cuda": 65_536, "cpu": 16_384}  # of a microbatch; more makes none faster
STEP = 1_024  # tokens that an automatic microbatch is a multiple of
# Bytes: CUDA's context, NCCL, graphs and what a sleeping vLLM keeps; a process's code.
CONTEXT = {"cuda": 4.0e9, "cpu": 0.7e9}
SLACK = 0.05  # of a GPU, lost to fragments
FAR = 1.5  # times a machine's memory over which a forecast is refused on a CPU, where it may swap
ENGINE_WORK = 3.0e9  # bytes of vLLM beside weights and cache: a prefill of 16,384 tokens
MOST_SHARE = 0.9  # of a GPU, for an engine
MOST_ROWS = 1_024  # that engine=transformers decodes at once; more makes none faster
FILLED = 1.25  # columns of the cache of engine=transformers to those in use; a layer is held twice
NAMES = {
    "optimizer": "optimizer states",
    "casts": "autocast's copies",
    "exchange": "exchange between ranks",
    "activations": "activations",
}


class Facts(NamedTuple):
    """What a forecast is made of."""

    shape: Shape
    setting: Setting
    total: float  # bytes of the device that a rank has
    longest: int  # tokens of the longest prompt and response
    tokens: int | None  # of a microbatch; None: auto
    engine: Engine
    plans: bool  # whether a plan takes gradient norms, of a microbatch's tokens at once


class Engine(NamedTuple):
    """What an engine takes of a rank's device: a share, or so much for each row."""

    fixed: float = 0  # bytes without its cache
    row: float = 0  # bytes of the cache of a response at its longest
    has_share: bool = False
    share: float | None = None  # of the device, as it was given; None: auto
    rows: int | None = None  # decoded at once, as they were given; None: auto
    keeps: float = 0  # bytes that it keeps while the policy trains
    sleeps: bool = True  # whether it gives back all else then

    @property
    def least(self) -> float:
        """Bytes with which it can draw one response at a time."""
        return self.fixed + self.row


class Forecast(NamedTuple):
    facts: Facts
    tokens: int  # of a microbatch
    share: float | None  # of the device, the engine's
    rows: int | None  # that engine=transformers decodes at once
    training: dict[str, float]  # bytes by part
    sampling: dict[str, float]
    syncing: dict[str, float]
    planning: dict[str, float]

    @property
    def phases(self) -> dict[str, float]:
        """Bytes by phase, those that the run has."""
        named = ("training", "sampling", "syncing", "planning")
        return {name: sum(parts.values()) for name in named if (parts := getattr(self, name))}


# --- what is known of a run ----------------------------------------------------------------------


def facts_of(cfg: DictConfig, model: PreTrainedModel, total: float, vllm: bool) -> Facts:
    """Of a configuration.

    Args:
        model: of `model.path`, which may be empty.
        total: bytes of a rank's device.
        vllm: what engine=auto takes.
    """
    shape = memory.shape_of(model.config, model)
    setting = setting_of(cfg, model)
    data = cfg.datamodule
    longest = data.max_prompt_tokens + data.max_response_tokens
    tokens = cfg.algo.get("tokens_per_microbatch", "auto")
    draws = "responses_per_step" in data
    pilots = OmegaConf.select(cfg, "callbacks.sampler.pilots") if draws else None
    engine = engine_of(cfg, shape, setting, longest, vllm) if draws else Engine()
    given = None if tokens == "auto" else int(tokens)
    return Facts(shape, setting, total, longest, given, engine, bool(pilots))


def setting_of(cfg: DictConfig, model: PreTrainedModel) -> Setting:
    """How a configuration trains."""
    held, precision = held_by(cfg), str(cfg.trainer.precision)
    kind: memory.Arithmetic = "float32"
    if precision.startswith("bf16"):
        whole = held == "ddp" and precision.endswith("mixed")
        kind = "autocast" if whole or precision == "bf16" and held == "ddp" else "half"
    adapters = None
    if cfg.model.get("lora") is not None:
        adapters = adapters_of(model, OmegaConf.to_container(cfg.model.lora, resolve=True))
    return Setting(
        held=held,
        ranks=cfg.trainer.devices * cfg.trainer.num_nodes,
        arithmetic=kind,
        element=4
        if cfg.model.dtype == "float32" and not precision.endswith("true")
        else element(cfg),
        recompute=recomputes(cfg, model),
        adapters=adapters,
        critic=cfg.algo.get("critic") == "separate",
        reference=has_reference(cfg),
        offload=bool(cfg.strategy.get("offload")),
        fused=bool(cfg.algo.optimizer.get("fused")),
        device="cuda" if on_gpu(cfg) else "cpu",
    )


def element(cfg: DictConfig) -> int:
    """Bytes of a weight under a precision that is the weights' own too."""
    if str(cfg.trainer.precision) == "bf16-true":
        return 2
    return 4 if cfg.model.dtype == "float32" else 2


def on_gpu(cfg: DictConfig) -> bool:
    return cfg.trainer.accelerator in ("gpu", "cuda")


def recomputes(cfg: DictConfig, model: PreTrainedModel) -> bool:
    asked = cfg.model.get("gradient_checkpointing", False)
    return on_gpu(cfg) and model.supports_gradient_checkpointing if asked == "auto" else bool(asked)


def held_by(cfg: DictConfig) -> Held:
    target = target_of(cfg.strategy)
    if is_kind(target, DeepSpeed):
        stages: dict[int, Held] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return stages[cfg.strategy.stage]
    return "fsdp" if is_kind(target, FSDP) else "ddp"


def has_reference(cfg: DictConfig) -> bool:
    """Whether a frozen copy of the policy stands beside it."""
    scores = getattr(target_of(cfg.algo), "scores", ())
    initial = cfg.algo.get("reference") == "initial"  # of Iterative DPO
    return initial or "ref_logprobs" in scores or cfg.algo.get("kl_coef", 0) > 0


def adapters_of(model: PreTrainedModel, lora: Any) -> int:
    """Parameters of LoRA's adapters."""
    settings = lora_settings(lora)
    layers = dict(model.named_modules())
    names = target_names(model, settings["target_modules"])
    sizes = (layers[name] for name in names)
    return sum(settings["r"] * (layer.in_features + layer.out_features) for layer in sizes)


def engine_of(cfg: DictConfig, shape: Shape, setting: Setting, longest: int, vllm: bool) -> Engine:
    node = cfg.engine
    if target_of(node) is auto_engine:
        node = node.vllm if vllm else node.transformers
    half = setting.arithmetic != "float32"
    if "max_rows" in node:  # engine=transformers
        size = 2 if half else setting.element
        weights = size * shape.parameters
        return Engine(
            fixed=weights + TILES_OF_DRAW * memory.TILE[setting.device],
            row=(FILLED + 1 / shape.layers) * longest * memory.cached_token(shape, size),
            rows=None if node.max_rows == "auto" else int(node.max_rows),
            keeps=weights if setting.device == "cpu" else 0,
            sleeps=cfg.get("pipeline", "none") == "none",
        )
    if not is_kind(target_of(node), VLLMEngine):
        return Engine()  # on other devices
    size = 4 if node.dtype == "float32" or (node.dtype == "auto" and not on_gpu(cfg)) else 2
    weights = size * shape.parameters / node.tensor_parallel
    one = longest * memory.cached_token(shape, size) / node.tensor_parallel
    if not on_gpu(cfg):
        return Engine(weights + (node.kv_cache_gb or 1.0) * 2**30, rows=0, sleeps=False)
    if node.kv_cache_gb is not None:
        cache = node.kv_cache_gb * 2**30
        return Engine(weights + ENGINE_WORK + cache, rows=0, sleeps=node.sleep_level > 0)
    return Engine(
        fixed=weights + ENGINE_WORK,
        row=one,
        has_share=True,
        share=None if node.gpu_memory_share == "auto" else float(node.gpu_memory_share),
        sleeps=node.sleep_level > 0,
    )


TILES_OF_DRAW = 3  # logits, their distribution, and its sums in float64


# --- the forecast --------------------------------------------------------------------------------


def forecast(facts: Facts) -> Forecast:
    """What a run will take; tokens and share as they were given, or as much as fits."""
    shape, setting, engine = facts.shape, facts.setting, facts.engine
    tokens = facts.tokens or fitting_tokens(facts)
    train = memory.training(shape, setting, tokens)
    rest = memory.resting(shape, setting)
    whole = 4.0 * shape.largest  # a parameter on its way to the engine
    awake = 0 if engine.sleeps else sum(train.values()) - rest
    room = usable(facts) - rest - whole - awake
    share, rows = engine.share, engine.rows
    if engine.has_share:
        if share is None:
            share = max(0.01, min(MOST_SHARE, math.floor(100 * room / facts.total) / 100))
        takes = share * facts.total
    else:
        if rows is None and engine.row:
            rows = max(1, min(MOST_ROWS, int((room - engine.fixed) // engine.row)))
        takes = engine.fixed + (rows or 0) * engine.row
    keeps = engine.keeps if engine.sleeps else takes
    base = {"process": CONTEXT[setting.device]}
    sampling = base | {"trainer": rest, "engine": takes}
    plan = {}
    if facts.plans:
        plan = base | {"trainer": rest, "engine": keeps}
        plan["norms"] = memory.planning(shape, setting, tokens)
    return Forecast(
        facts=facts,
        tokens=tokens,
        share=share,
        rows=rows or None,
        training=base | train | {"engine": keeps},
        sampling=sampling if takes else {},
        syncing=sampling | {"a parameter": whole} if takes else {},
        planning=plan,
    )


def usable(facts: Facts) -> float:
    """Bytes of a rank's device that tensors can have."""
    slack = SLACK * facts.total if facts.setting.device == "cuda" else 0
    return facts.total - CONTEXT[facts.setting.device] - slack


def fitting_tokens(facts: Facts) -> int:
    """Tokens of a microbatch that fit, at least those of the longest sequence."""
    engine = facts.engine
    keeps = engine.keeps
    if not engine.sleeps:  # what was given, or what it cannot do without
        keeps = engine.fixed + (engine.rows or 1) * engine.row
        if engine.share is not None:
            keeps = engine.share * facts.total
    room = usable(facts) - keeps

    def needs(tokens: int) -> float:
        return sum(memory.training(facts.shape, facts.setting, tokens).values())

    a_token = (needs(STEP) - needs(0)) / STEP
    fits = math.floor((room - needs(0)) / a_token / STEP) * STEP
    return max(facts.longest, min(MOST_TOKENS[facts.setting.device], fits))


# --- what does not fit ---------------------------------------------------------------------------


def check(found: Forecast) -> None:
    """Whether a run fits its devices.

    Raises:
        UserError: it does not; how much is missing, and what would fit.
    """
    facts = found.facts
    if facts.setting.device == "cpu":
        most = max(found.phases.values())
        if most > FAR * facts.total:
            phase = max(found.phases, key=lambda name: found.phases[name])
            raise UserError(refusal(found, phase))
        return
    room = usable(facts) + CONTEXT["cuda"]
    for phase in ("training", "sampling", "syncing", "planning"):
        if found.phases.get(phase, 0) > room:
            raise UserError(refusal(found, phase))
    if found.share is not None and found.share * facts.total < facts.engine.least:
        if facts.engine.share is None:
            raise UserError(refusal(found, "sampling"))
        needed = math.ceil(100 * facts.engine.least / facts.total) / 100
        raise UserError(
            f"engine.gpu_memory_share={found.share} is {gb(found.share * facts.total)} GB, but the"
            f" engine needs {gb(facts.engine.least)} for its weights, a prefill and one response."
            f" Raise it to {needed}, or set it to auto."
        )


def refusal(found: Forecast, phase: str) -> str:
    facts, what = found.facts, {"training": "An update", "planning": "A plan of budgets"}
    place = "GPU" if facts.setting.device == "cuda" else "process, of the machine's memory,"
    said = (
        f"{what.get(phase, 'Sampling')} does not fit: {gb(found.phases[phase])} GB on paper"
        f" ({parts(getattr(found, phase))}), and each {place} has {gb(facts.total)}, of which"
        f" {gb(usable(facts) + CONTEXT[facts.setting.device])} can be counted on."
    )
    fits = list(mends(found))
    if not fits:
        return f"{said} No other setting of this model fits: take more devices, or a smaller model."
    return f"{said} On paper it fits with {', or '.join(fits)}."


def mends(found: Forecast) -> Iterator[str]:
    """Settings under which a run would fit, with the largest of its phases."""
    facts = found.facts
    setting = facts.setting
    tries: list[tuple[str, Facts]] = []

    def also(words: str, **given: Any) -> None:
        tries.append((words, facts._replace(tokens=None, setting=setting._replace(**given))))

    if facts.tokens is not None:
        tries.append(("algo.tokens_per_microbatch=auto", facts._replace(tokens=None)))
    if facts.engine.share is not None:
        freed = facts._replace(engine=facts.engine._replace(share=None))
        tries.append(("engine.gpu_memory_share=auto", freed))
    if facts.engine.rows and facts.engine.row:
        fewer = facts._replace(engine=facts.engine._replace(rows=None))
        tries.append(("engine.max_rows=auto", fewer))
    if not setting.recompute:
        also("model.gradient_checkpointing=true", recompute=True)
    if setting.ranks > 1:
        half = "half" if setting.arithmetic == "autocast" else setting.arithmetic
        for held in ("zero2", "fsdp", "zero3"):
            if held != setting.held:
                name = held if held == "fsdp" else f"deepspeed_{held}"
                words = f"strategy={name}"
                if not setting.recompute:
                    words += " model.gradient_checkpointing=true"
                also(words, held=held, arithmetic=half, recompute=True)
    if setting.adapters is None:
        adapters = setting.ranks and round(0.01 * facts.shape.parameters)
        words = '"model.lora={r: 16, alpha: 32}"'
        also(f"{words} model.gradient_checkpointing=true", adapters=adapters, recompute=True)
    for words, other in tries:
        tried = forecast(other)
        try:
            check_fits(tried)
        except UserError:
            continue
        yield f"{words} ({gb(max(tried.phases.values()))} GB)"


def check_fits(found: Forecast) -> None:
    """`check`, without a list of what would fit."""
    facts = found.facts
    room = usable(facts) + CONTEXT[facts.setting.device]
    least = found.share is not None and found.share * facts.total < facts.engine.least
    if least or max(found.phases.values()) > room:
        raise UserError("it does not fit")


# --- words ---------------------------------------------------------------------------------------


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def parts(sizes: Mapping[str, float]) -> str:
    told = [(NAMES.get(name, name), size) for name, size in sizes.items() if size >= 5e7]
    return ", ".join(f"{name} {gb(size)}" for name, size in told)


def line(found: Forecast) -> str:
    """The forecast in a line."""
    facts, phases = found.facts, found.phases
    place = "GPU" if facts.setting.device == "cuda" else "process"
    told = [
        f"Memory of a {place} on paper, of {gb(facts.total)} GB: training {gb(phases['training'])}"
        f" ({parts(found.training)}; microbatches of {found.tokens:,} tokens)"
    ]
    if "sampling" in phases:
        share = "" if found.share is None else f"; engine.gpu_memory_share={found.share:g}"
        share = share if found.rows is None else f"; {found.rows:,} rows at once"
        told.append(f"sampling {gb(phases['sampling'])} ({parts(found.sampling)}{share})")
        told.append(f"a weight sync {gb(phases['syncing'])}")
    if "planning" in phases:
        told.append(f"planning {gb(phases['planning'])}")
    return ", ".join(told) + "."


# --- a run's own ---------------------------------------------------------------------------------


def settle(cfg: DictConfig) -> Forecast:
    """Forecasts a run, and puts what comes out of it where its configuration says auto.

    Depends on what a device has, never on what is free there, so that the same command gives the
    same run.

    Raises:
        UserError: it does not fit.
    """
    trust = cfg.model.trust_remote_code
    model = empty_model(load_config(cfg.model.path, trust), trust)
    found = forecast(facts_of(cfg, model, device_bytes(cfg), vllm=why_not_vllm() is None))
    check(found)
    settled = {
        "algo.tokens_per_microbatch": found.tokens,
        "model.gradient_checkpointing": found.facts.setting.recompute,
        "engine.gpu_memory_share": found.share,
        "engine.vllm.gpu_memory_share": found.share,
        "engine.max_rows": found.rows,
        "engine.transformers.max_rows": found.rows,
    }
    for key, value in settled.items():
        if value is not None and OmegaConf.select(cfg, key) == "auto":
            OmegaConf.update(cfg, key, value)
    return found


def device_bytes(cfg: DictConfig) -> float:
    """Bytes of a rank's device: a GPU's, or an equal part of the machine's memory."""
    devices = cfg.trainer.devices
    if on_gpu(cfg):
        here = range(min(devices, torch.cuda.device_count()))
        return float(min(torch.cuda.get_device_properties(i).total_memory for i in here))
    return float(machine_bytes() // devices)


def machine_bytes() -> int:
    """The machine's memory, or what its container may have of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(said)) if said.isdecimal() else machine


def write(found: Forecast, run_dir: Path, measured: Mapping[str, float] | None = None) -> None:
    """`forecast.json`: bytes by phase and part, and those measured, once they are."""
    settled = {
        "tokens_per_microbatch": found.tokens,
        "gpu_memory_share": found.share,
        "max_rows": found.rows,
    }
    device = {"device": found.facts.setting.device, "bytes_of_a_device": found.facts.total}
    paper = {name: getattr(found, name) for name in found.phases}
    told = device | settled | {"on_paper": paper, "measured": measured}
    (run_dir / FILE).write_text(json.dumps(told, indent=2) + "\n")


def compared(found: Forecast, measured: Mapping[str, float]) -> str:
    """What the first rollout step took beside what it was to take, in a line."""
    what = {"cuda": "tensors on the fullest GPU", "cpu": "resident, of the largest process"}
    phases = [
        f"{name} {gb(measured[name])} ({gb(size)} on paper)"
        for name, size in found.phases.items()
        if name in measured
    ]
    kind = what[found.facts.setting.device]
    return f"Memory of the first step, GB, measured ({kind}): {', '.join(phases)}."
