"""The main job over seeds, GVM against uniform budgets at equal responses.

    python experiments/main_job/study.py [--seeds 5] [--jobs 2] [--runs outputs/main_job]

Runs the default job `algo=grpo` with `sampler=gvm` and `sampler=uniform` for each seed, each run a
process of its own with one thread, and writes `results.csv` (one row per run), `curves.csv` (one
row per validation), `summaries/` and `figure.png` beside this file. Runs that are already there
are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

HERE = Path(__file__).parent
SAMPLERS = {"gvm": "#1f5fa8", "uniform": "#e07b28"}
COLUMNS = ("responses", "tokens", "updates", "seconds", "planning_share", "pilot_share")


def run(folder: Path, sampler: str, seed: int) -> Path:
    run_dir = folder / f"{sampler}_{seed}"
    if not (run_dir / "summary.json").exists():
        command = [sys.executable, "-m", "rlzoo.run", "algo=grpo", f"sampler={sampler}"]
        command += [f"seed={seed}", f"run_dir={run_dir}", "num_threads=1"]
        if run_dir.exists():
            command.append("ckpt_path=last")
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return run_dir


def curve(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["val/avg_at_8"]]


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def collect(runs: dict[tuple[str, int], Path]) -> None:
    results, curves = [], []
    (HERE / "summaries").mkdir(exist_ok=True)
    for (sampler, seed), run_dir in runs.items():
        text = (run_dir / "summary.json").read_text()
        (HERE / "summaries" / f"{sampler}_{seed}.json").write_text(text)
        summary = json.loads(text)
        row = {"sampler": sampler, "seed": seed}
        row |= {f"avg_at_8_{k}": summary[f"val_avg_at_8_{k}"] for k in ("first", "last", "best")}
        results.append(row | {name: summary[name] for name in COLUMNS})
        for point in curve(run_dir):
            names = ("responses", "tokens", "updates", "val/avg_at_8", "val/pass_at_8")
            curves.append(
                {"sampler": sampler, "seed": seed} | {name: point[name] for name in names}
            )
    write_csv(HERE / "results.csv", results)
    write_csv(HERE / "curves.csv", curves)


def draw(runs: dict[tuple[str, int], Path]) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for sampler, colour in SAMPLERS.items():
        for seed in sorted(seed for name, seed in runs if name == sampler):
            points = curve(runs[sampler, seed])
            x = [int(p["responses"]) for p in points]
            y = [100 * float(p["val/avg_at_8"]) for p in points]
            label = f"sampler={sampler}" if seed == 0 else None
            axes.plot(x, y, color=colour, alpha=0.75, marker=".", label=label)
    axes.set(xlabel="responses drawn, pilots included", ylabel="validation avg@8, %")
    axes.set_title("algo=grpo on arithmetic, one line per seed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "figure.png", dpi=120)


def report(path: Path) -> None:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for sampler in SAMPLERS:
        mine = [row for row in rows if row["sampler"] == sampler]
        get = lambda name: np.array([100 * float(row[f"avg_at_8_{name}"]) for row in mine])  # noqa: E731
        first, last, best = get("first"), get("last"), get("best")
        gain = last - first
        print(
            f"{sampler:8} {first.mean():.1f} -> {last.mean():.1f}: gain {gain.mean():.1f} points"
            f" (lowest {gain.min():.1f}, deviation {gain.std(ddof=1):.1f}),"
            f" last below best by at most {(best - last).max():.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--runs", type=Path, default=Path("outputs/main_job"))
    args = parser.parse_args()
    todo = [(sampler, seed) for seed in range(args.seeds) for sampler in SAMPLERS]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(zip(todo, pool.map(lambda job: run(args.runs, *job), todo), strict=True))
    collect(runs)
    draw(runs)
    report(HERE / "results.csv")


if __name__ == "__main__":
    main()
