"""What a forecast of memory is made of, as a configuration and its model have it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from rlzoo.algos.iterative_dpo import IterativeDPO
from rlzoo.engines.process import EngineProcess
from rlzoo.engines.select import auto_engine
from rlzoo.engines.vllm import VLLMEngine
from rlzoo.launch.targets import is_kind, target_of
from rlzoo.models import memory
from rlzoo.models.lora import lora_settings, target_names
from rlzoo.models.memory import Held, Setting, Shape
from rlzoo.strategies import FSDP, DeepSpeed

# Bytes: CUDA's context, NCCL, graphs and what a sleeping vLLM keeps; a process's code.
CONTEXT = {"cuda": 4.0e9, "cpu": 0.7e9}
# Left free: of a GPU what is lost to fragments; of a machine what the system, its page cache and
# verifier workers take.
SLACK = {"cuda": 0.05, "cpu": 0.25}
ENGINE_WORK = 3.0e9  # bytes of vLLM beside weights and cache: a prefill of 16,384 tokens
FILLED = 1.25  # columns of the cache of engine=transformers to those in use; a layer is held twice
TILES_OF_DRAW = 3  # logits, their distribution, and its sums in float64
MOMENTS = {  # bytes a parameter that an optimizer keeps, by the name of its class
    "AdamW": 8,
    "Adam": 8,
    "SGD": 0,  # and 4 with momentum
    "AdamW8bit": 2,
    "Adam8bit": 2,
}


class Facts(NamedTuple):
    """What a forecast is made of."""

    shape: Shape
    setting: Setting
    total: float  # bytes of the device that a rank has
    longest: int  # tokens of the longest prompt and response
    unit: int  # tokens of the longest that no microbatch splits: a sequence, or a pair of them
    tokens: int | None  # of a microbatch; None: auto
    engine: Engine
    plans: bool  # whether a plan takes gradient norms, of a microbatch's tokens at once
    guessed: bool = False  # whether the optimizer is unknown, and counted as AdamW


class Engine(NamedTuple):
    """What an engine takes of a rank's device: a share, or so much for each row."""

    weights: float = 0  # bytes on a device
    work: float = 0  # bytes beside them, without the cache of rows
    row: float = 0  # bytes of the cache of a response at its longest
    at: str = "engine"  # where its keys stand
    parallel: int = 1  # devices that hold one engine together
    most_parallel: int = 1  # of a machine, that could
    has_share: bool = False
    share: float | None = None  # of the device, as it was given; None: auto
    rows: int | None = None  # decoded at once, as they were given; None: auto
    keeps: float = 0  # bytes that it keeps while the policy trains
    sleeps: bool = True  # whether it gives back all else then
    elsewhere: float | None = None  # bytes of the machine's memory, where it is on no GPU

    @property
    def fixed(self) -> float:
        """Bytes without the cache of rows."""
        return self.weights + self.work

    @property
    def least(self) -> float:
        """Bytes with which it can draw one response at a time."""
        return self.fixed + self.row

    def over(self, devices: int) -> Engine:
        """The same, held by so many devices together."""
        part = self.parallel / devices
        return self._replace(
            weights=part * self.weights, row=part * self.row, parallel=devices, share=None
        )


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
    unit = longest * (2 if is_kind(target_of(cfg.algo), IterativeDPO) else 1)
    tokens = cfg.algo.get("tokens_per_microbatch", "auto")
    draws = "responses_per_step" in data
    pilots = OmegaConf.select(cfg, "callbacks.sampler.pilots") if draws else None
    engine = engine_of(cfg, shape, setting, longest, vllm) if draws else Engine()
    given = None if tokens == "auto" else int(tokens)
    guessed = moments_of(cfg) is None
    return Facts(shape, setting, total, longest, unit, given, engine, bool(pilots), guessed)


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
        moments=8 if (moments := moments_of(cfg)) is None else moments,
        wide=2 if precision.startswith("64") else 1,
        device="cuda" if on_gpu(cfg) else "cpu",
    )


def moments_of(cfg: DictConfig) -> int | None:
    """Bytes a parameter that the optimizer keeps, where it is one that is known."""
    node = cfg.algo.optimizer
    found = MOMENTS.get(str(node.get("_target_")).rpartition(".")[2])
    return 4 if found == 0 and node.get("momentum") else found


def element(cfg: DictConfig) -> int:
    """Bytes of a weight under a precision that is the weights' own too; `wide` doubles them."""
    if str(cfg.trainer.precision) == "64-true":
        return 4
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
    node, at = cfg.engine, "engine"
    if target_of(node) is auto_engine:
        at = "engine.vllm" if vllm else "engine.transformers"
        node = node.vllm if vllm else node.transformers
    if "max_rows" in node:
        return own_engine(cfg, node, at, shape, setting, longest)
    if not is_kind(target_of(node), VLLMEngine):
        return Engine()  # on other devices
    size = 4 if node.dtype == "float32" or (node.dtype == "auto" and not on_gpu(cfg)) else 2
    weights = size * shape.parameters / node.tensor_parallel
    if not on_gpu(cfg):
        cache = (node.kv_cache_gb or 1.0) * 2**30
        return Engine(weights, cache, at=at, rows=0, sleeps=False)
    found = Engine(
        weights=weights,
        work=ENGINE_WORK,
        at=at,
        parallel=node.tensor_parallel,
        most_parallel=cfg.trainer.devices,
        sleeps=node.sleep_level > 0,
    )
    if node.kv_cache_gb is not None:
        return found._replace(work=ENGINE_WORK + node.kv_cache_gb * 2**30, rows=0)
    return found._replace(
        row=longest * memory.cached_token(shape, size) / node.tensor_parallel,
        has_share=True,
        share=None if node.gpu_memory_share == "auto" else float(node.gpu_memory_share),
    )


def own_engine(
    cfg: DictConfig, node: DictConfig, at: str, shape: Shape, setting: Setting, longest: int
) -> Engine:
    """engine=transformers, in the trainer's process or one of its own, which is on the CPU."""
    apart = is_kind(target_of(node), EngineProcess) or node.get("device") == "cpu"
    device = "cpu" if apart else setting.device
    elsewhere = None
    if apart and setting.device == "cuda":
        a_rank = machine_bytes() // cfg.trainer.devices
        elsewhere = (1 - SLACK["cpu"]) * a_rank - 2 * CONTEXT["cpu"]  # two processes
    wide = setting.wide * setting.element
    size = wide if setting.arithmetic == "float32" else 2
    weights = size * shape.parameters
    return Engine(
        weights=weights,
        work=TILES_OF_DRAW * memory.TILE[device],
        row=(FILLED + 1 / shape.layers) * longest * memory.cached_token(shape, size),
        at=at,
        rows=None if node.max_rows == "auto" else int(node.max_rows),
        keeps=weights if setting.device == "cpu" else 0,
        sleeps=cfg.get("pipeline", "none") == "none",
        elsewhere=elsewhere,
    )


def machine_bytes() -> int:
    """The machine's memory, or what its container may have of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(said)) if said.isdecimal() else machine
