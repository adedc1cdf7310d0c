"""Runs a study: named variants of a run, over seeds, at equal cost; then its tables and figure.

    python experiments/study.py experiments/NAME [--seeds 3] [--jobs 2] [--runs outputs/NAME]

`experiments/NAME/variants.yaml` names the variants, each a list of overrides, the overrides common
to all, and what a variant is called in the tables (`label`; "variant" if not given). Every run is
a process of its own with one thread; runs that are already there are not run again, interrupted
ones are resumed. Written beside the variants: `results.csv` (a row per run), `curves.csv` (a row
per validation), `table.md` (a row per variant) and `figure.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from drift import drift_along, entropy_and_kl_to_start  # noqa: E402

from rlzoo.report.columns import AVG, PASS, validated_ks  # noqa: E402

Job = tuple[str, int]  # variant, seed
SPENT = ("responses", "tokens", "updates", "seconds", "planning_share", "pilot_share")
MEANS = ("entropy", "kl_to_start", "tokens", "updates", "seconds")
# 97.5% points of Student's t by degrees of freedom, and of the normal distribution beyond.
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 1.960]
CURVE = ("rollout_step", "responses", "tokens", "updates", "time/seconds")


def run(run_dir: Path, overrides: list[str], seed: int) -> Path | None:
    """Runs or resumes one job, in its own directory; None if it failed."""
    if not (run_dir / "summary.json").exists():
        command = [sys.executable, "-m", "rlzoo.run", *overrides, f"seed={seed}"]
        command += [f"run_dir={run_dir}", "num_threads=1"]
        if run_dir.exists():
            command.append("ckpt_path=last")
        with open(f"{run_dir}.out", "a") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, env=environment, stdout=out, stderr=out).returncode
        if code:
            print(f"{run_dir.name} failed with exit code {code}: see {run_dir}.out", flush=True)
            return None
    drift = run_dir / "drift.json"
    if not drift.exists():
        drift.write_text(json.dumps(entropy_and_kl_to_start(run_dir)))
    along = run_dir / "along.json"
    if not along.exists():
        steps = [int(point["rollout_step"]) for point in curve(run_dir)[:-1]]
        along.write_text(json.dumps(drift_along(run_dir, steps)))
    print(f"{run_dir.name} is done", flush=True)
    return run_dir


def curve(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv that validated."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"{AVG}{k}" for k in validated_ks(rows[0])]
    return [row for row in rows if any(row[name] for name in names)]


def k_of(run_dir: Path) -> int:
    """The k of the run's avg@k.

    Raises:
        SystemExit: it had several, or none: it is no curve of one figure.
    """
    ks = validated_ks(curve(run_dir)[0]) if curve(run_dir) else []
    if len(ks) != 1:
        sys.exit(f"{run_dir} was validated with k = {ks}: a study needs one k, in all its runs.")
    return ks[0]


def common_k(run_dirs: Iterable[Path]) -> int:
    """The k that all runs of a study share."""
    ks = {str(run_dir): k_of(run_dir) for run_dir in run_dirs}
    if len(set(ks.values())) != 1:
        sys.exit(f"datamodule.val_responses must be the same in all runs of a study, got {ks}.")
    return next(iter(ks.values()))


def points(job: Job, run_dir: Path) -> list[dict[str, object]]:
    """Rows of curves.csv; entropy and KL to the start are of `drift`."""
    along = json.loads((run_dir / "along.json").read_text())
    k, rows = k_of(run_dir), []
    figures = (f"{AVG}{k}", f"{PASS}{k}")
    for point in curve(run_dir):
        row: dict[str, object] = {"variant": job[0], "seed": job[1]}
        row |= {name.rpartition("/")[2]: point.get(name, "") for name in (*CURVE, *figures)}
        rows.append(row | along.get(point["rollout_step"], {}))
    final = json.loads((run_dir / "drift.json").read_text())
    rows[-1] |= {"entropy": final["entropy"], "kl": final["kl_to_start"]}
    return rows


def result(job: Job, run_dir: Path) -> dict[str, object]:
    """One row of results.csv."""
    summary, k = json.loads((run_dir / "summary.json").read_text()), k_of(run_dir)
    row: dict[str, object] = {"variant": job[0], "seed": job[1]}
    row |= {f"avg_at_{k}_{x}": summary[f"val_avg_at_{k}_{x}"] for x in ("first", "last", "best")}
    row[f"pass_at_{k}_last"] = float(curve(run_dir)[-1][f"{PASS}{k}"])
    row |= {name: summary[name] for name in SPENT}
    return row | json.loads((run_dir / "drift.json").read_text())


def write_csv(path: Path, rows: list[dict], label: str) -> None:
    """`label` is what the column of variants is called."""
    names = list(rows[0])
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([label if name == "variant" else name for name in names])
        writer.writerows([row[name] for name in names] for row in rows)


def interval(values: list[float]) -> str:
    """Mean and half width of its 95% interval over seeds (Student's t); of two, both."""
    x = np.asarray(values, float)
    if len(x) < 3:
        return " / ".join(f"{value:.1f}" for value in x)
    half = STUDENT[min(len(x) - 2, 10)] * x.std(ddof=1) / np.sqrt(len(x))
    return f"{x.mean():.1f} ± {half:.1f}"


def table(rows: list[dict], k: int) -> str:
    """Markdown: a row per variant; figures at the last validation, in the order of variants."""
    lines = [
        f"| variant | avg@{k} first → last, % | gain (lowest), points | best − last"
        f" | pass@{k} last, % |"
        " entropy, nats | KL to start, nats | tokens, k | updates | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        mean = {name: np.mean([float(row[name]) for row in mine]) for name in MEANS}
        columns = [f"avg_at_{k}_{x}" for x in ("first", "last", "best")] + [f"pass_at_{k}_last"]
        first, last, best, passed = ([100 * float(row[name]) for row in mine] for name in columns)
        gain = np.subtract(last, first)
        lines.append(
            f"| {variant} | {np.mean(first):.1f} → {interval(last)}"
            f" | {gain.mean():.1f} ({gain.min():.1f}) | {np.mean(np.subtract(best, last)):.1f}"
            f" | {interval(passed)} | {mean['entropy']:.3f} | {mean['kl_to_start']:.3f}"
            f" | {mean['tokens'] / 1000:.0f} | {mean['updates']:.0f} | {mean['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(runs: dict[Job, Path], path: Path, title: str, k: int) -> None:
    """Mean over seeds of avg@k against responses, with the range of seeds shaded."""
    variants = list(dict.fromkeys(variant for variant, _ in runs))
    colours = plt.get_cmap("tab20" if len(variants) > 10 else "tab10").colors
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for i, variant in enumerate(variants):
        curves = [curve(run_dir) for (name, _), run_dir in runs.items() if name == variant]
        shared = set.intersection(*({p["rollout_step"] for p in c} for c in curves))
        curves = [[p for p in c if p["rollout_step"] in shared] for c in curves]
        x = np.mean([[int(p["responses"]) for p in c] for c in curves], axis=0)
        y = np.array([[100 * float(p[f"{AVG}{k}"]) for p in c] for c in curves])
        style = {"color": colours[i % len(colours)], "linestyle": "-" if i < 20 else "--"}
        axes.plot(x, y.mean(0), marker=".", label=variant, **style)
        axes.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="responses drawn, pilots and filtered ones included", title=title)
    axes.set_ylabel(f"validation avg@{k}, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2 if len(variants) > 6 else 1)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="experiments/NAME, with variants.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--runs", type=Path, help="run directories; outputs/NAME if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = yaml.safe_load((args.folder / "variants.yaml").read_text())
    folder = args.runs or Path("outputs") / args.folder.name
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(variant, seed) for seed in range(args.seeds) for variant in study["variants"]]

    def work(job: Job) -> Path:
        overrides = study.get("common", []) + study["variants"][job[0]]
        return run(folder / re.sub(r"[^\w.-]+", "_", f"{job[0]}_{job[1]}"), overrides, job[1])

    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(jobs, pool.map(work, jobs), strict=True))
    if None in done.values():
        sys.exit("Some runs failed: mend them and call the study again; the others are kept.")
    by_variant = [(variant, seed) for variant in study["variants"] for seed in range(args.seeds)]
    runs = {job: done[job] for job in by_variant}
    k = common_k(runs.values())
    rows = [result(job, run_dir) for job, run_dir in runs.items()]
    label = study.get("label", "variant")
    write_csv(args.folder / "results.csv", rows, label)
    every = [point for job, run_dir in runs.items() for point in points(job, run_dir)]
    write_csv(args.folder / "curves.csv", every, label)
    (args.folder / "table.md").write_text(table(rows, k))
    draw(runs, args.folder / "figure.png", study["title"], k)
    print(table(rows, k))


if __name__ == "__main__":
    main()
