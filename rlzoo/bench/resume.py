"""Whether a run that is killed again and again ends as the run that was left alone.

For each strategy, two processes train the shipped policy for eight rollout steps: once left alone,
once with another seed as a control, and once killed by SIGKILL, all its processes at once, and
resumed, until it has been killed `--kills` times. The moments are random, steered so that every
phase of the ledger is hit: the parent looks where the run is (rlzoo/bench/_watched.py), lets a
random time pass inside the phase that was hit least, and kills. The last line is JSON with
    kills: by strategy;
    equal: metrics.csv and ledger.csv (times aside), rollouts/ and budgets/ (byte by byte) and the
        final weights (bit by bit) of the killed run are those of the run left alone;
    control_differs: those of the control are not;
    phases: kills by the phase that rank 0 was in when it died;
    mid_accumulation: kills in training between two microbatches of one optimizer step;
    saves: kills in checkpointing by what was on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlzoo.bench._equal import equal_but_time
from rlzoo.bench._watched import PHASES, phase_of
from rlzoo.launch.summary import read_metrics
from rlzoo.models.checkpoints import whole_weights

RUN = (sys.executable, "-m", "rlzoo.run")
STRATEGIES = ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp")
STEPS = 8  # rollout steps of a run, two an epoch
RANKS = 2
OPTIONS = (
    "num_threads=1",
    "engine=transformers",
    f"trainer.devices={RANKS}",
    "algo.tokens_per_microbatch=400",  # two and more to an update
    "val_every=2",
    "data.num_train=64",
    "data.num_val=8",
    "datamodule.prompts_per_epoch=16",
    "datamodule.responses_per_prompt=4",
    "datamodule.responses_per_step=32",
    "sampler.callback.pilots=2",
    f"limits.max_responses={STEPS * 48}",  # 32 pilots and 64 responses an epoch
    "algo.updates=2",
)
STEERED = PHASES[: PHASES.index("between")]
HALF = "half written"  # within checkpointing: there is a checkpoint that has not been renamed
AIMS = (*STEERED, HALF)
MOST_IN_STARTING = 2  # such a kill costs a start and tells little
ANYWHERE = 7  # every so many kills one is not steered
LOOK = 0.0005  # seconds between two looks at where a run is
Line = dict[str, Any]  # of one kill, or of one strategy
PATIENCE = 900.0  # seconds after which a run counts as hung


# --- one run ------------------------------------------------------------------------------------


class WatchedRun:
    """One process tree of a run, in a process group of its own, seen from outside.

    Args:
        folder: the run directory.
        options: overrides of the run.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.where = folder.with_suffix(".where")
        self.where.write_bytes(bytes(2))
        watched = f"{{_target_: rlzoo.bench._watched.Watched, where: '{self.where}'}}"
        said = folder.with_suffix(".txt")
        self.began = time.monotonic()
        self.process = self.start(
            [f"run_dir={folder}", f"+callbacks.watched={watched}", *options], said
        )
        self.output = said.open()

    def start(self, overrides: list[str], said: Path) -> subprocess.Popen[bytes]:
        """Starts the run; what it says is added to the file `said`."""
        with said.open("a") as output:
            return subprocess.Popen(
                [*RUN, *overrides],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> WatchedRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def phase(self) -> str:
        return PHASES[self.where.read_bytes()[0]]

    @property
    def microbatches(self) -> int:
        """That the update in progress has trained on."""
        return self.where.read_bytes()[1]

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Looks until the condition holds; False if the run ended before.

        Raises:
            RuntimeError: it failed, or takes longer than PATIENCE.
        """
        while not condition():
            if self.process.poll() is not None:
                self.finish()
                return False
            if time.monotonic() - self.began > PATIENCE:
                raise RuntimeError(f"{self.folder.name} hangs in {self.phase}: {self.tail()}")
            time.sleep(LOOK)
        return True

    def kill(self) -> None:
        """Kills all its processes, if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()

    def finish(self) -> None:
        """Waits for the end of the run.

        Raises:
            RuntimeError: it failed.
        """
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{self.folder.name} hangs in {self.phase}: {self.tail()}") from None
        if code:
            raise RuntimeError(f"{self.folder.name} failed with {code}: {self.tail()}")

    def tail(self) -> str:
        return self.folder.with_suffix(".txt").read_text()[-2000:]


def boundaries(folder: Path) -> int:
    """Rollout steps that the last checkpoint of a run holds."""
    try:
        name = os.readlink(folder / "checkpoints" / "last.ckpt")
    except FileNotFoundError:
        return 0
    return int(name.removeprefix("step_").removesuffix(".ckpt"))


def save_state(folder: Path) -> str:
    """What a kill while checkpointing left: how far the save had come."""
    names = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    if any(name.endswith(".partial") for name in names):
        return HALF
    whole = [int(name.removeprefix("step_").removesuffix(".ckpt")) for name in names]
    if whole and max(whole) > boundaries(folder):
        return "renamed, not yet the last"
    return "not begun, or all done"


# --- when to kill -------------------------------------------------------------------------------


@dataclass
class Kill:
    """One kill: what was aimed at, and where it hit."""

    aimed: str | None  # one of AIMS; None is anywhere
    delay: float  # seconds let pass in that phase
    phase: str
    step: int  # rollout steps in the last checkpoint
    microbatches: int
    saved: str | None  # of a kill while checkpointing


def choose(hits: Counter[str], done: int, rng: random.Random) -> str:
    """An aim that was hit least, among those that the rest of the run has."""
    possible = [phase for phase in AIMS if phase != "planning" or done <= STEPS - 2]
    if hits["starting"] >= MOST_IN_STARTING:
        possible.remove("starting")
    least = min(hits[phase] for phase in possible)
    return rng.choice([phase for phase in possible if hits[phase] == least])


def kill_once(
    folder: Path,
    options: tuple[str, ...],
    aimed: str | None,
    delay: float,
    first: int,
) -> Kill | None:
    """Starts or resumes a run and kills it.

    Args:
        aimed: one of AIMS to kill it in; None is anywhere after its start.
        delay: seconds between its being seen there and its end.
        first: not before the last checkpoint holds so many rollout steps.

    Returns:
        None if the run ended before.
    """
    ready = False  # seen elsewhere after the first `first` steps, so that it now enters the phase

    def there() -> bool:
        nonlocal ready
        phase = run.phase
        if phase == "checkpointing" and aimed == HALF:
            phase = save_state(folder)
        if aimed is None:
            return phase not in ("starting", "between") and boundaries(folder) >= first
        ready = ready or (phase != aimed and boundaries(folder) >= first)
        return phase == aimed and (ready or aimed == "starting")

    with WatchedRun(folder, *options, "ckpt_path=auto") as run:
        if not run.wait_for(there):
            return None
        time.sleep(delay)
        if run.process.poll() is not None:
            run.finish()
            return None
        run.kill()
    saved = save_state(folder) if run.phase == "checkpointing" else None
    return Kill(aimed, delay, run.phase, boundaries(folder), run.microbatches, saved)


def lengths_of_run(folder: Path, options: tuple[str, ...]) -> dict[str, float]:
    """Runs to the end; mean seconds spent in each phase at a time, of the steps that had it."""
    with WatchedRun(folder, *options) as run:
        run.wait_for(lambda: run.phase != "starting")
        lengths = {"starting": time.monotonic() - run.began}
        run.finish()
    rows = read_metrics(folder / "metrics.csv")[1:]
    for phase in STEERED[1:]:
        spent = [seconds_of(row, phase) for row in rows]
        spent = [seconds for seconds in spent if seconds > 1e-4]
        lengths[phase] = sum(spent) / len(spent)
    return lengths | {HALF: lengths["checkpointing"] / 4}


def seconds_of(row: dict[str, str], phase: str) -> float:
    """Of a row of metrics.csv, spent in one of PHASES."""
    times = {name.removeprefix("time/"): t for name, t in row.items() if name.startswith("time/")}
    return sum(float(text) for name, text in times.items() if text and phase_of(name) == phase)


# --- one strategy -------------------------------------------------------------------------------


def study(strategy: str, root: Path, kills: int, seed: int, note: Callable[[Line], None]) -> Line:
    """Runs one strategy; `note` is told of every kill as it comes."""
    options = (*OPTIONS, f"strategy={strategy}")
    whole, control, killed = (
        root / f"{strategy}_{name}" for name in ("whole", "control", "killed")
    )
    lengths = lengths_of_run(whole, options)
    run_to_the_end(control, (*options, "seed=1"))
    rng = random.Random(f"{seed}/{strategy}")
    hits: Counter[str] = Counter()
    misses: Counter[str | None] = Counter()
    for i in range(kills):
        done = boundaries(killed)
        aimed = None if i % ANYWHERE == ANYWHERE - 1 else choose(hits, done, rng)
        length = sum(lengths[phase] for phase in STEERED[1:]) if aimed is None else lengths[aimed]
        delay = rng.uniform(0, length) / 2 ** misses[aimed]  # sooner where it came too late
        hit = kill_once(killed, options, aimed, delay, i * (STEPS - 2) // kills)
        if hit is None:
            break
        hits.update({hit.phase, hit.saved or hit.phase})
        misses[aimed] += aimed not in (None, hit.phase, hit.saved)
        note({"strategy": strategy, "kill": i + 1, **asdict(hit)})
    run_to_the_end(killed, (*options, "ckpt_path=auto"))
    differences = compare(killed, whole)
    return {
        "strategy": strategy,
        "kills": sum(hits[phase] for phase in PHASES),
        "equal": not differences,
        "control_differs": control_differs(control, whole),
        "phases": {phase: hits[phase] for phase in PHASES},
        "differences": differences[:20],
    }


def run_to_the_end(folder: Path, options: tuple[str, ...]) -> None:
    with WatchedRun(folder, *options) as run:
        run.finish()


def compare(folder: Path, other: Path) -> list[str]:
    """Where two finished runs differ, one sentence each; empty for equal runs."""
    found = [
        f"{name}: {difference}"
        for name in ("metrics.csv", "ledger.csv")
        for difference in equal_but_time(folder / name, other / name)
    ]
    for name in ("rollouts", "budgets"):
        files = [{p.name: p.read_bytes() for p in (d / name).iterdir()} for d in (folder, other)]
        found += [f"{name}/{said}" for said in unlike(files, operator.eq)]
    tensors = [weights(run_dir) for run_dir in (folder, other)]
    return found + [f"weights: {said}" for said in unlike(tensors, torch.equal)]


def unlike(runs: Sequence[Mapping[str, Any]], equal: Callable[[Any, Any], bool]) -> list[str]:
    """Of two runs, names that only one has, then those whose values differ."""
    ours, theirs = runs
    missing = [f"{name}: in one run only" for name in sorted(ours.keys() ^ theirs.keys())]
    common = sorted(ours.keys() & theirs.keys())
    return missing + [f"{n}: differs" for n in common if not equal(ours[n], theirs[n])]


def control_differs(control: Path, whole: Path) -> bool:
    """Whether every comparison tells a run with another seed apart."""
    kinds = {
        difference.partition(":")[0].partition("/")[0] for difference in compare(control, whole)
    }
    return kinds >= {"metrics.csv", "ledger.csv", "rollouts", "budgets", "weights"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints what it reads
        return whole_weights((folder / "checkpoints" / "last.ckpt").resolve())


# --- all of it ----------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench resume")
    parser.add_argument("--kills", type=int, default=20, help="kills of each strategy's run")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--run-root", type=Path, help="keeps the runs there; default: none is kept")
    parser.add_argument(
        "--results", type=Path, help="adds a line of JSON for each kill and strategy"
    )
    args = parser.parse_args(argv)
    root = args.run_root or Path(tempfile.mkdtemp(prefix="rlzoo-resume-"))
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    lines: list[Line] = []

    def note(line: Line) -> None:
        lines.append(line)
        if args.results:
            with args.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)

    try:
        for strategy in args.strategies.split(","):
            note(study(strategy, root, args.kills, args.seed, note))
    finally:
        if args.run_root is None:
            shutil.rmtree(root, ignore_errors=True)
    print_table([line for line in lines if "equal" in line])
    print(json.dumps(headline(lines)))


def print_table(studies: list[Line]) -> None:
    print(f"{'':15}" + "".join(f"{found['strategy']:>17}" for found in studies))
    for key in ("kills", "equal", "control_differs"):
        print(f"{key:15}" + "".join(f"{found[key]!s:>17}" for found in studies))
    for phase in PHASES:
        print(f"{phase:15}" + "".join(f"{found['phases'][phase]:>17}" for found in studies))


def headline(lines: list[Line]) -> dict[str, object]:
    """The figures of all strategies together."""
    studies = [line for line in lines if "equal" in line]
    kills = [line for line in lines if "kill" in line]
    middle = [k for k in kills if k["phase"] == "training" and k["microbatches"]]
    return {
        "kills": {found["strategy"]: found["kills"] for found in studies},
        "equal": all(found["equal"] for found in studies),
        "control_differs": all(found["control_differs"] for found in studies),
        "phases": {phase: sum(k["phase"] == phase for k in kills) for phase in PHASES},
        "mid_accumulation": len(middle),
        "saves": dict(Counter(k["saved"] for k in kills if k["saved"])),
    }
