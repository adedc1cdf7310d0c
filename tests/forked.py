"""Processes of their own without six seconds of imports each: forked from a server that has them
behind it. Signals, exit codes and what dies with whom are those of any process."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.multiprocessing

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.imported"])


class Program:
    """`python -m MODULE ARGUMENTS`, with Popen's words; its output goes to a file.

    Args:
        module: name of a module, or path of a script.
        said: the file for standard output and error.
        variables: the environment; None is this process's.
        leader: whose process group it joins; None is one of its own.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        said: Path,
        *,
        cwd: Path = ROOT,
        variables: dict[str, str] | None = None,
        leader: int | None = None,
    ) -> None:
        self.said = said
        environment = {**(os.environ if variables is None else variables), "OMP_NUM_THREADS": "1"}
        argv, options = [module, *arguments], (str(said), str(cwd), environment, leader)
        self.process = SERVER.Process(target=become, args=(argv, *options))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.said), timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.said.read_text(), None

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Ranks:
    """The ranks of one run on this machine, each as torchrun starts it; with Popen's words, too.

    What rank N says goes to `said` with .rankN before its suffix, but for rank 0.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        said: Path,
        *,
        count: int = 2,
        variables: dict[str, str] | None = None,
    ) -> None:
        shared = dict(os.environ if variables is None else variables) | {
            "TORCHELASTIC_RUN_ID": "test",
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self.programs: list[Program] = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            file = said if rank == 0 else said.with_suffix(f".rank{rank}{said.suffix}")
            leader = self.programs[0].pid if rank else None
            program = Program(module, arguments, file, variables=shared | own, leader=leader)
            self.programs.append(program)
        self.pid = self.programs[0].pid  # of their process group

    def poll(self) -> int | None:
        """None while one runs, then 0, or the code of one that failed."""
        codes = [program.poll() for program in self.programs]
        return None if None in codes else next(filter(None, codes), 0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        return [program.wait(timeout) for program in self.programs] and self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        return "".join(program.communicate(timeout)[0] for program in self.programs), None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def become(
    argv: list[str], said: str, cwd: str, environment: dict[str, str], leader: int | None
) -> None:
    """Turns a forked process into the program."""
    os.setpgid(0, leader or 0)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # A shell that runs the tests in the background makes them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = argv
    try:
        if argv[0].endswith(".py"):
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter


def on_ranks(function: Callable[..., None], arguments: tuple, ranks: int) -> None:
    """Calls the function with each rank and the arguments, each in a process of its own.

    Raises:
        Exception: one of them failed.
    """
    torch.multiprocessing.start_processes(
        function, arguments, nprocs=ranks, start_method="forkserver"
    )
