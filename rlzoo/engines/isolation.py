"""Keeps what a library does to its process while it starts from the trainer that shares it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch.utilities.seed import isolate_rng

_speaking = threading.Lock()
_terminal: int | None = None  # a copy of the process's own standard error, while it is redirected


@contextmanager
def isolated(log_file: Path, keep: str) -> Iterator[None]:
    """Undoes, at the end, changes to random states, threads, affinity, the precision of matrix
    products and the environment; what is printed meanwhile, by native code too, goes to `log_file`.

    Args:
        log_file: appended to.
        keep: environment variables with this prefix stay as they were set.
    """
    environment = dict(os.environ)
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    cores, precision = os.sched_getaffinity(0), torch.get_float32_matmul_precision()
    try:
        with isolate_rng(), redirected(log_file):
            yield
    finally:
        kept = {name: value for name, value in os.environ.items() if name.startswith(keep)}
        os.environ.clear()
        os.environ.update(environment | kept)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        for task in os.listdir("/proc/self/task"):
            try:
                os.sched_setaffinity(int(task), cores)
            except ProcessLookupError:
                continue  # a thread that has ended since


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Within it, torch computes with so many threads on the CPU; None leaves their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def redirected(log_file: Path) -> Iterator[None]:
    """Sends what is written to the process's standard output and error to a file.

    `say` still speaks to the terminal.
    """
    global _terminal
    log_file.parent.mkdir(parents=True, exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    copies = [os.dup(number) for number in (1, 2)]
    with log_file.open("ab") as file:
        try:
            for stream in streams:
                stream.flush()
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            outer, _terminal = _terminal, copies[1] if _terminal is None else _terminal
            yield
        finally:
            for stream in streams:
                stream.flush()
            with _speaking:
                _terminal = outer
                for number, copy in zip((1, 2), copies, strict=True):
                    os.dup2(copy, number)
                    os.close(copy)


def say(text: str) -> None:
    """Prints a line to the process's own standard error, from any thread, redirected or not."""
    with _speaking:
        if _terminal is None:
            print(text, file=sys.stderr, flush=True)
        else:
            os.write(_terminal, f"{text}\n".encode())
