"""What a run will take of each device's memory, before anything starts, and how it is told.
`rlzoo.models.memory` has the formulas, `rlzoo.launch.fitting` what is settled and refused by it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rlzoo.launch.facts import CONTEXT, SLACK, Facts
from rlzoo.models import memory

FILE = "forecast.json"
MOST_TOKENS = {"cuda": 65_536, "cpu": 16_384}  # of a microbatch; more makes none faster
STEP = 1_024  # tokens that an automatic microbatch is a multiple of
MOST_SHARE = 0.9  # of a GPU, for an engine
MOST_ROWS = 1_024  # that engine=transformers decodes at once; more makes none faster
NAMES = {
    "optimizer": "optimizer states",
    "casts": "autocast's copies",
    "exchange": "exchange between ranks",
    "activations": "activations",
}


class Forecast(NamedTuple):
    facts: Facts
    tokens: int  # of a microbatch
    share: float | None  # of the device, the engine's
    rows: int | None  # that engine=transformers decodes at once
    training: dict[str, float]  # bytes by part
    sampling: dict[str, float]
    syncing: dict[str, float]
    planning: dict[str, float]
    left: float = 0  # bytes that the trainer leaves an engine

    @property
    def largest(self) -> int:
        """Tokens of the largest microbatch: what is never split may have more than it is given."""
        return max(self.tokens, self.facts.unit)

    @property
    def phases(self) -> dict[str, float]:
        """Bytes by phase, those that the run has."""
        named = ("training", "sampling", "syncing", "planning")
        return {name: sum(parts.values()) for name in named if (parts := getattr(self, name))}


# --- sums -----------------------------------------------------------------------------------------


def forecast(facts: Facts) -> Forecast:
    """What a run will take; tokens and share as they were given, or as much as fits."""
    shape, setting, engine = facts.shape, facts.setting, facts.engine
    tokens = facts.tokens or fitting_tokens(facts)
    train = memory.training(shape, setting, max(tokens, facts.unit))
    rest = memory.resting(shape, setting)
    whole = 4.0 * setting.wide * shape.largest  # a parameter on its way to the engine
    awake = 0 if engine.sleeps else sum(train.values()) - rest
    room = usable(facts) - rest - whole - awake
    share, rows = engine.share, engine.rows
    if engine.has_share:
        if share is None:
            share = max(0.01, min(MOST_SHARE, hundredths(room / facts.total)))
        takes = share * facts.total
    else:
        has = room if engine.elsewhere is None else engine.elsewhere
        if rows is None and engine.row:
            rows = max(1, min(MOST_ROWS, int((has - engine.fixed) // engine.row)))
        takes = engine.fixed + (rows or 0) * engine.row if engine.elsewhere is None else 0
    keeps = engine.keeps if engine.sleeps else takes
    base = {"process": CONTEXT[setting.device]}
    sampling = base | {"trainer": rest, "engine": takes}
    plan = {}
    if facts.plans:
        plan = base | {"trainer": rest, "engine": keeps}
        plan["norms"] = memory.planning(shape, setting, max(tokens, facts.longest))
    return Forecast(
        facts=facts,
        tokens=tokens,
        share=share,
        rows=rows or None,
        training=base | train | {"engine": keeps},
        sampling=sampling if takes else {},
        syncing=sampling | {"a parameter": whole} if takes else {},
        planning=plan,
        left=room,
    )


def usable(facts: Facts) -> float:
    """Bytes of a rank's device that tensors can have."""
    return countable(facts) - CONTEXT[facts.setting.device]


def countable(facts: Facts) -> float:
    """Bytes of a rank's device that a run can count on."""
    return (1 - SLACK[facts.setting.device]) * facts.total


def hundredths(share: float) -> float:
    return math.floor(100 * share) / 100


def fitting_tokens(facts: Facts) -> int:
    """Tokens of a microbatch that fit, at least those of the longest that is never split."""
    engine = facts.engine
    keeps = engine.keeps
    if not engine.sleeps:  # what was given, or what it cannot do without
        keeps = engine.fixed + (engine.rows or 1) * engine.row if engine.elsewhere is None else 0
        if engine.share is not None:
            keeps = engine.share * facts.total
    room = usable(facts) - keeps

    def fits(tokens: int) -> bool:
        return sum(memory.training(facts.shape, facts.setting, tokens).values()) <= room

    most = range(MOST_TOKENS[facts.setting.device], 0, -STEP)  # logits that are kept make a bump
    return max(facts.unit, next((tokens for tokens in most if fits(tokens)), STEP))


# --- words ----------------------------------------------------------------------------------------


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def parts(sizes: Mapping[str, float]) -> str:
    told = [(NAMES.get(name, name), size) for name, size in sizes.items() if size >= 5e7]
    return ", ".join(f"{name} {gb(size)}" for name, size in told)


def line(found: Forecast) -> str:
    """The forecast in a line."""
    facts, phases = found.facts, found.phases
    place = "GPU" if facts.setting.device == "cuda" else "process"
    size = f"microbatches of {found.tokens:,} tokens"
    if found.largest > found.tokens:
        size += f", up to {found.largest:,} where one is never split"
    if facts.guessed:
        size += "; optimizer states as if AdamW's, so nothing is refused"
    told = [
        f"Memory of a {place} on paper, of {gb(facts.total)} GB: training {gb(phases['training'])}"
        f" ({parts(found.training)}; {size})"
    ]
    if "sampling" in phases:
        share = "" if found.share is None else f"; engine.gpu_memory_share={found.share:g}"
        share = share if found.rows is None else f"; {found.rows:,} rows at once"
        told.append(f"sampling {gb(phases['sampling'])} ({parts(found.sampling)}{share})")
        told.append(f"a weight sync {gb(phases['syncing'])}")
    if "planning" in phases:
        told.append(f"planning {gb(phases['planning'])}")
    return ", ".join(told) + "."


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
    """What the first rollout step took beside what it was to take, in a line.

    A process gives nothing back to the system, so on a CPU a phase's mark has what earlier ones
    took: the phase that is the largest on paper alone says something.
    """
    both = {name: size for name, size in found.phases.items() if name in measured}
    kind = "tensors on the fullest GPU"
    if found.facts.setting.device == "cpu":
        kind = "resident, of the largest process, where most was foreseen"
        largest = max(both, key=lambda name: both[name], default="")
        both = {name: size for name, size in both.items() if name == largest}
    told = [f"{name} {gb(measured[name])} ({gb(size)} on paper)" for name, size in both.items()]
    return f"Memory of the first step, GB, measured ({kind}): {', '.join(told)}."
