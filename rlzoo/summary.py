"""What a run achieved: `summary.json`, the picture, and one paragraph."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlzoo.data.base import RunDataModule
from rlzoo.plots import draw_run


def summarize(run_dir: Path, cfg: DictConfig, data: RunDataModule) -> list[str]:
    """Writes `summary.json` and `learning.png`; returns the paragraph to print.

    Shares are fractions of 1. `responses` and `tokens` are the paid ones: training, filtered ones
    and pilots; `planning_share` is the sampler's own time, pilots aside, over all seconds.
    """
    ledger = data.ledger
    labels = choices(cfg)
    figures: dict[str, Any] = labels | {
        "responses": ledger.responses,
        "tokens": ledger.tokens,
        "updates": ledger.updates,
        "seconds": ledger.seconds,
        "planning_share": ledger.share("planning"),
        "pilot_share": ledger.counts["responses/pilot"] / max(1, ledger.responses),
        "stopped_by": data.stop_reason(),
        "ledger": ledger.row(),
    }
    rows = read_metrics(run_dir / "metrics.csv")
    for name in validation_columns(rows):
        values = [float(row[name]) for row in rows if row[name]]
        key = name.replace("/", "_")
        figures |= {f"{key}_first": values[0], f"{key}_last": values[-1], f"{key}_best": max(values)}
    (run_dir / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
    if not rows or not validation_columns(rows):
        return [f"Done in {ledger.seconds:.0f} s. Everything is in {run_dir}."]
    picture = draw_run(run_dir, labels)
    return paragraph(figures, run_dir, picture, next(iter(validation_columns(rows))))


def paragraph(figures: dict[str, Any], run_dir: Path, picture: Path, column: str) -> list[str]:
    key = column.replace("/", "_")
    first, last, best = (figures[f"{key}_{which}"] for which in ("first", "last", "best"))
    name = column.removeprefix("val/").replace("_at_", "@")
    tries = "sampler=uniform" if figures.get("sampler") == "gvm" else "sampler=gvm"
    return [
        "",
        f"Validation {name} went from {first:.1%} to {last:.1%} (best {best:.1%}) with"
        f" {figures['responses']:,} responses, {figures['tokens']:,} generated tokens and"
        f" {figures['updates']:,} updates, in {figures['seconds']:.0f} s; pilots were"
        f" {figures['pilot_share']:.0%} of the responses, planning {figures['planning_share']:.1%}"
        " of the time.",
        f"Everything is in {run_dir}: look at {picture.name}, read rollouts/ to see what it says,"
        " and load the policy from policy/.",
        f"Next: the same with {tries}, or algo=raft_pp, and compare the two learning.png; or seed=1"
        " to see how much is luck.",
    ]


def validation_columns(rows: list[dict[str, str]]) -> list[str]:
    return [name for name in (rows[0] if rows else {}) if name.startswith("val/avg_at_")]


def read_metrics(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def choices(cfg: DictConfig) -> dict[str, Any]:
    """The config groups chosen, and the seed: what tells one run from another."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    named = {name: chosen[name] for name in ("algo", "sampler", "model", "data") if name in chosen}
    return named | {"seed": cfg.seed}
