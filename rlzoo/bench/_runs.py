"""Whole runs as a user starts them, step by step, and where their seconds went."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlzoo.bench._random_policies import save_policy

NOT_THE_STEP = ("engine_start", "other", "seconds", "tokens_per_second")
BARE = (  # what a rollout step costs, and nothing beside it
    "num_threads=1",
    "sampler=uniform",
    "data.num_val=1",
    "val_every=0",
    "logger=csv",
    "limits.max_responses=null",
    "callbacks.validation=null",
    "callbacks.checkpoint=null",
    "callbacks.export=null",
    "callbacks.rollout_log.rollouts_every=0",
)
Row = dict[str, float]  # seconds of a rollout step by phase


def rows_of(*overrides: str) -> list[Row]:
    """Seconds of each rollout step of a run, by phase; what belongs to no step is left out.

    Raises:
        CalledProcessError: the run failed; what it said stands above.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlzoo.run", f"run_dir={folder}/run", *BARE, *overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            done.check_returncode()
        with (Path(folder) / "run" / "metrics.csv").open() as file:
            return [phases(row) for row in csv.DictReader(file) if row["num_rollouts"]]


def phases(row: dict[str, str]) -> Row:
    """The seconds in a row of metrics.csv."""
    times = {name: value for name, value in row.items() if name.startswith("time/") and value}
    named = {name.removeprefix("time/"): float(value) for name, value in times.items()}
    return {name: value for name, value in named.items() if name not in NOT_THE_STEP}


def seconds(rows: Sequence[Row], *names: str) -> float:
    """Of all rows, in phases that begin with one of these names; in all of them without any."""
    chosen = names or ("",)
    return sum(v for row in rows for name, v in row.items() if name.startswith(chosen))


def model_of(policy: str, folder: str) -> tuple[str, ...]:
    """Overrides that take a policy: "tiny", or a random one of `_random_policies.SHAPES`, saved in
    the folder, whose responses have geometric lengths of 32 on average; learning moves it so little
    that every step is the same work."""
    if policy == "tiny":
        return ()
    save_policy(Path(folder), policy, mean_length=32.0)
    return ("model=hf", f"model.path={folder}", "lr=1.0e-9")
