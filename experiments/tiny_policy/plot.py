"""Copies the three runs' metrics beside this file and draws them.

python experiments/tiny_policy/plot.py outputs/tiny_policy
"""

import csv
import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent


def main(runs: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.5), sharey=True, layout="constrained")
    for name, panel in zip(("skill", "polish", "habits"), panels, strict=True):
        copy = HERE / f"{name}.csv"
        shutil.copyfile(runs / name / "metrics.csv", copy)
        with open(copy, newline="") as file:
            rows = list(csv.DictReader(file))
        updates = [int(row["updates"]) for row in rows]
        panel.plot(updates, [float(row["loss"]) for row in rows], label="training corpus")
        panel.plot(updates, [float(row["val/loss"]) for row in rows], label="careful, held out")
        panel.set(xlabel="updates", title=name, yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("-log π per solution token, nats")
    panels[0].legend()
    figure.savefig(HERE / "curve.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
