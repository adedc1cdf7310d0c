"""`python -m rlzoo.run algo=grpo sampler=gvm`: compose the configuration, train."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlzoo.errors import UserError, one_line
from rlzoo.launch.configuration import check_overrides, conf_dir, quoted_homes
from rlzoo.launch.processes import check_processes, port_in_use, run_name
from rlzoo.launch.schema import check_settings

INTERRUPTED = 130  # exit code of a run stopped by Ctrl-C
FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
PREEMPTED = 143  # exit code of a run stopped by SIGTERM or SLURM's SIGUSR1, once it has saved


def main() -> None:
    """Entry point; exits 2 on a mistake of the user's, 130 on Ctrl-C, 143 on SIGTERM."""
    sys.argv[1:] = quoted_homes(sys.argv[1:])
    try:
        check_overrides(sys.argv[1:])
        if not any(override.startswith("run_dir=") for override in sys.argv[1:]):
            run_name()  # Hydra would show a stack trace for what it may raise
    except UserError as error:
        fail(str(error))
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(run)()


def run(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    if multirun:
        cfg.run_dir = hydra_config.runtime.output_dir  # one directory per job of a sweep
    try:  # before anything reads a setting
        check_settings(cfg)
        check_processes(cfg.trainer, multirun and not is_submitit(hydra_config.launcher._target_))
    except UserError as error:
        fail(str(error))
    from rlzoo.callbacks.preemption import Preempted
    from rlzoo.launch.training import train

    try:
        train(cfg)
    except Preempted as signal_:
        print(f"rlzoo: {signal_}: saved. {go_on(cfg)}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        interrupted(cfg)
    except SystemExit:
        interrupted(cfg)  # Lightning turns Ctrl-C into this
    except Exception as error:
        message = explain(error, cfg)
        if message is None or cfg.debug is True:
            traceback.print_exc()
        fail(message or f"{type(error).__name__}: {error}")


def explain(error: BaseException, cfg: DictConfig) -> str | None:
    """What to tell the user of an error that is theirs to mend; None for a fault of ours."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in FULL:
            return (
                f"The disk is full: {cause}. {what_stands(cfg)} Free some space and go on with"
                f" run_dir={cfg.run_dir} ckpt_path=last."
            )
        if isinstance(cause, OSError) and cause.errno in READ_ONLY and inside(cause, cfg):
            return (
                f"The run directory can no longer be written to: {cause}. {what_stands(cfg)} Make"
                f" it writable and go on with run_dir={cfg.run_dir} ckpt_path=last."
            )
        if "EADDRINUSE" in str(cause):
            return port_in_use(os.environ.get("MASTER_PORT", "that was chosen"))
        if type(cause).__name__ == "MisconfigurationException":
            return f"Lightning cannot run this: {one_line(cause)}"
        if "unexpected keyword argument" in str(cause) and isinstance(
            error, InstantiationException
        ):
            return f"A key that its class does not take: {one_line(error)}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, (InstantiationException, OmegaConfBaseException)):
        return str(error)
    return None


def inside(error: OSError, cfg: DictConfig) -> bool:
    """Whether an operating system's error is about something in the run directory."""
    folder = Path(cfg.run_dir).absolute()
    return error.filename is not None and folder in Path(str(error.filename)).absolute().parents


def is_submitit(launcher: str) -> bool:
    """Whether a launcher is submitit's, or a class made from it."""
    return any("submitit" in base.__module__ for base in get_class(launcher).__mro__)


def what_stands(cfg: DictConfig) -> str:
    checkpoint = Path(cfg.run_dir) / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        return f"The last boundary checkpoint, {checkpoint}, stands."
    return "No boundary had been reached, so a resumed run starts anew."


def interrupted(cfg: DictConfig) -> None:
    print(f"\nInterrupted. {what_stands(cfg)} {go_on(cfg)}", file=sys.stderr)
    sys.exit(INTERRUPTED)


def go_on(cfg: DictConfig) -> str:
    return f"Go on with run_dir={cfg.run_dir} ckpt_path=last."


def fail(message: str) -> None:
    print(f"rlzoo: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
