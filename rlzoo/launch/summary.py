"""What a run achieved: `summary.json`, the picture, and one paragraph."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlzoo.callbacks.state import Run
from rlzoo.report.columns import AVG, validated_ks
from rlzoo.report.plots import plot_run


def summarize(
    run_dir: Path, cfg: DictConfig, run: Run, rollout_steps: int, exported: bool = True
) -> list[str]:
    """Writes `summary.json` and `learning.png`; returns the paragraph to print.

    Shares are fractions of 1. `responses` and `tokens` are the paid ones: training, filtered ones
    and pilots. Of all seconds, `planning_share` is the sampler's own computing (gradient norms and
    budgets), and `pilot_seconds_share` what drawing and verifying pilots took beside it;
    `pilot_share` is of the paid responses. Of `val_avg_at_K`, for every K that the run had, the
    first, last and best value that is a number.

    Args:
        exported: whether the policy has been written, where one was to be.
    """
    ledger = run.ledger
    labels = choices(cfg)
    figures: dict[str, Any] = labels | {
        "responses": ledger.responses,
        "tokens": ledger.tokens,
        "updates": ledger.updates,
        "seconds": ledger.seconds,
        "planning_share": ledger.share("planning"),
        "pilot_seconds_share": ledger.share("pilot"),
        "pilot_share": ledger.counts["responses/pilot"] / max(1, ledger.responses),
        "rollout_steps": rollout_steps,
        "stopped_by": run.ended_by,
        "exported": exported,
        "ledger": ledger.row(),
    }
    rows = read_metrics(run_dir / "metrics.csv")
    values_of = {name: values for name in validation_columns(rows) if (values := known(rows, name))}
    for name, values in values_of.items():
        key = name.replace("/", "_")
        figures |= {
            f"{key}_first": values[0],
            f"{key}_last": values[-1],
            f"{key}_best": max(values),
        }
    (run_dir / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
    if not values_of:
        return [f"Done in {ledger.seconds:.0f} s. Everything is in {run_dir}."]
    picture = plot_run(run_dir, labels)
    own = f"{AVG}{cfg.datamodule.get('val_responses', 0)}"  # others: of a k that the run had before
    return paragraph(figures, run_dir, picture, own if own in values_of else list(values_of)[-1])


NOTHING_LEARNT = (
    "Nothing was learnt: every update was skipped, since no response was right, or those of each"
    " prompt had one reward (accept_rate and degenerate_groups in metrics.csv)."
)


def ended(run_dir: Path, rollout_steps: int) -> bool:
    """Whether all that a run's end writes has been written, for an end after so many steps."""
    try:
        figures = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        steps = figures.get("rollout_steps", rollout_steps)  # older summaries do not say
        return bool(steps == rollout_steps and figures.get("exported", True))
    except (OSError, ValueError, AttributeError):
        return False


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
        f" {figures['pilot_share']:.0%} of the responses and {figures['pilot_seconds_share']:.0%}"
        f" of the time, planning {figures['planning_share']:.1%} of it.",
        *([] if figures["updates"] else [NOTHING_LEARNT]),
        f"Everything is in {run_dir}: look at {picture.name}, read rollouts/ to see what it says"
        + (", and load the policy from policy/." if figures["exported"] else "."),
        f"Next: the same with {tries}, or algo=raft_pp, and compare the two learning.png; or seed=1"
        " to see how much is luck.",
    ]


def validation_columns(rows: list[dict[str, str]]) -> list[str]:
    return [f"{AVG}{k}" for k in validated_ks(rows[0] if rows else {})]


def known(rows: list[dict[str, str]], name: str) -> list[float]:
    """A column's finite values, in order."""
    return [value for row in rows if row.get(name) and math.isfinite(value := float(row[name]))]


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
