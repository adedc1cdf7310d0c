"""Whole runs as a user starts them, in a process that has its imports behind it: a second or two
each. What a command changes in its process (signals, logging, determinism) is put back."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from hydra.core.global_hydra import GlobalHydra

import rlzoo.run
from rlzoo.rewards.processes import WorkerServer

SMALL = (  # two rollout steps of 16 responses, from 8 prompts of 2
    "num_threads=1",
    "sampler=uniform",
    "logger=csv",
    "val_every=0",
    "data.num_train=16",
    "data.num_val=4",
    "datamodule.prompts_per_epoch=8",
    "datamodule.responses_per_prompt=4",
    "datamodule.responses_per_step=16",
    "datamodule.val_responses=2",
    "limits.max_responses=32",
    "algo.updates=2",
    "reward.num_workers=1",
)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class KeptServer(WorkerServer):
    """A verifier's server that the next run takes over, its imports and tables there already."""

    def close(self) -> None:
        """Leaves it; the pool has ended its workers."""


@functools.cache
def kept_server(memory_mb: int) -> KeptServer:
    return KeptServer(memory_mb)


class Outcome(NamedTuple):
    code: int  # what the process would have exited with
    output: str  # standard output and error together, as a user would read them


def run(run_dir: Path, *overrides: str, small: bool = True) -> Outcome:
    """`python -m rlzoo.run run_dir=... OVERRIDES`, here and now.

    Args:
        small: whether SMALL comes before the overrides.
    """
    arguments = [f"run_dir={run_dir}", *(SMALL if small else ()), *overrides]
    told = io.StringIO()
    with (
        process_kept(),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
        mock.patch("rlzoo.rewards.verifier.WorkerServer", kept_server),
    ):
        code = 0
        try:
            with mock.patch.object(sys, "argv", ["rlzoo.run", *arguments]):
                rlzoo.run.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Outcome(code, told.getvalue())


def passed(run_dir: Path, *overrides: str, small: bool = True) -> str:
    """The output of a run that must succeed."""
    outcome = run(run_dir, *overrides, small=small)
    assert outcome.code == 0, outcome.output
    return outcome.output


def refused(run_dir: Path, *overrides: str, small: bool = True) -> str:
    """The one message of a run that must be refused, on one line; no stack trace, exit code 2."""
    outcome = run(run_dir, *overrides, small=small)
    assert outcome.code == 2, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    return " ".join(outcome.output.split())


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Puts back, at the end, what a run changes in its process."""
    root, environment = logging.getLogger(), dict(os.environ)
    handlers, level = list(root.handlers), root.level
    signals = {number: signal.getsignal(number) for number in SIGNALS}
    threads, rng = torch.get_num_threads(), torch.get_rng_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        GlobalHydra.instance().clear()
        logging.captureWarnings(False)
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:], root.level = handlers, level
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("lightning", "transformers", "py.warnings")):
                logging.getLogger(name).handlers.clear()
                logging.getLogger(name).propagate = True
        for number, handler in signals.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_rng_state(rng)
        torch.use_deterministic_algorithms(deterministic)
