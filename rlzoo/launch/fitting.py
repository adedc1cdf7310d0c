"""Whether a run fits its devices, what would if it does not, and what is settled where its
configuration says auto: `algo.tokens_per_microbatch`, `engine.gpu_memory_share`, `engine.max_rows`
and `model.gradient_checkpointing`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from rlzoo.engines.select import why_not_vllm
from rlzoo.engines.shapes import empty_model
from rlzoo.errors import UserError
from rlzoo.launch.facts import Facts, facts_of, machine_bytes, on_gpu
from rlzoo.launch.forecast import Forecast, countable, forecast, gb, hundredths, parts
from rlzoo.models.loading import load_config

FAR = 1.5  # times a machine's memory over which a forecast is refused on a CPU, where it may swap


PHASES = ("training", "sampling", "syncing", "planning")


def check(found: Forecast) -> None:
    """Whether a run fits its devices.

    Raises:
        UserError: it does not; how much is missing, and what would fit.
    """
    facts = found.facts
    if facts.guessed:
        return
    room = countable(facts) if facts.setting.device == "cuda" else FAR * facts.total
    phase = fault(found, room)
    if phase is not None:
        raise UserError(refusal(found, phase))


def fault(found: Forecast, room: float) -> str | None:
    """The first phase that takes more than there is room for; "engine" where an engine's share is
    less than it needs."""
    share, facts = found.share, found.facts
    for phase in PHASES:
        if found.phases.get(phase, 0) > room:
            return phase
    lacks = share is not None and share * facts.total < facts.engine.least
    return "engine" if lacks else None


def refusal(found: Forecast, phase: str) -> str:
    """What does not fit, by how much, and what would."""
    said = of_engine(found) if phase == "engine" else of_phase(found, phase)
    fits = list(mends(found))
    if fits:
        return f"{said} On paper it fits with {', or '.join(fits)}."
    return (
        f"{said} None of the settings that were tried fits: take more devices, a smaller model, or"
        " shorter responses."
    )


def of_phase(found: Forecast, phase: str) -> str:
    facts, what = found.facts, {"training": "An update", "planning": "A plan of budgets"}
    place = "GPU" if facts.setting.device == "cuda" else "process, of the machine's memory,"
    return (
        f"{what.get(phase, 'Sampling')} does not fit: {gb(found.phases[phase])} GB on paper"
        f" ({parts(getattr(found, phase))}), and each {place} has {gb(facts.total)}, of which"
        f" {gb(countable(facts))} can be counted on."
    )


def of_engine(found: Forecast) -> str:
    facts, share = found.facts, found.share or 0
    engine = facts.engine
    needs = (
        f"needs {gb(engine.least)} for its weights, a prefill and one response, and the trainer"
        f" leaves {gb(max(0, found.left))} of each GPU's {gb(facts.total)}."
    )
    if engine.share is None:
        return f"Sampling does not fit: the engine {needs}"
    said = f"{engine.at}.gpu_memory_share={share:g} is {gb(share * facts.total)} GB, but the"
    enough = math.ceil(100 * engine.least / facts.total) / 100
    raised = f" Raise it to {enough}." if enough <= hundredths(found.left / facts.total) else ""
    return f"{said} engine {needs}{raised}"


def mends(found: Forecast) -> Iterator[str]:
    """Settings under which a run would fit, with the largest of its phases."""
    for words, facts in tries(found.facts):
        tried = forecast(facts)
        if fault(tried, countable(facts)) is None:
            yield f"{words} ({gb(max(tried.phases.values()))} GB)"


def tries(facts: Facts) -> Iterator[tuple[str, Facts]]:
    """Settings that take less, by their words on the command line."""
    setting, engine = facts.setting, facts.engine

    def trained(**given: Any) -> Facts:
        return facts._replace(tokens=None, setting=setting._replace(**given))

    if facts.tokens is not None:
        yield "algo.tokens_per_microbatch=auto", facts._replace(tokens=None)
    if engine.share is not None:
        freed = engine._replace(share=None)
        yield f"{engine.at}.gpu_memory_share=auto", facts._replace(engine=freed)
    if engine.rows and engine.row:
        yield f"{engine.at}.max_rows=auto", facts._replace(engine=engine._replace(rows=None))
    for devices in (2, 4, 8):
        over = engine.most_parallel % devices == 0 and facts.shape.heads % devices == 0
        if over and engine.has_share and devices > engine.parallel:
            words = f"{engine.at}.tensor_parallel={devices}"
            if engine.share is not None:
                words += f" {engine.at}.gpu_memory_share=auto"
            yield words, facts._replace(engine=engine.over(devices))
    recomputing = "" if setting.recompute else " model.gradient_checkpointing=true"
    if recomputing:
        yield recomputing.strip(), trained(recompute=True)
    if setting.ranks > 1:
        half = "half" if setting.arithmetic == "autocast" else setting.arithmetic
        for held in ("zero2", "fsdp", "zero3"):
            if held != setting.held:
                name = held if held == "fsdp" else f"deepspeed_{held}"
                other = trained(held=held, arithmetic=half, recompute=True)
                yield f"strategy={name}{recomputing}", other
    if setting.adapters is None:
        adapters = round(0.01 * facts.shape.parameters)
        words = f'"model.lora={{r: 16, alpha: 32}}"{recomputing}'
        yield words, trained(adapters=adapters, recompute=True)


def settle(cfg: DictConfig) -> Forecast:
    """Forecasts a run, and puts what comes out of it where its configuration says auto.

    Depends on what a device has, never on what is free there, so that the same command gives the
    same run.

    Raises:
        UserError: it does not fit.
    """
    trust = cfg.model.trust_remote_code
    model = empty_model(load_config(cfg.model.path, trust), trust)
    total, vllm = device_bytes(cfg), why_not_vllm() is None
    found = forecast(facts_of(cfg, model, total, vllm))
    check(found)
    # engine=auto takes transformers too where vLLM does not know the model, which is seen later.
    rows = forecast(facts_of(cfg, model, total, vllm=False)).rows
    settled = {
        "algo.tokens_per_microbatch": found.tokens,
        "model.gradient_checkpointing": found.facts.setting.recompute,
        "engine.gpu_memory_share": found.share,
        "engine.vllm.gpu_memory_share": found.share,
        "engine.max_rows": found.rows,
        "engine.transformers.max_rows": rows,
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
