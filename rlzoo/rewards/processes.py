"""The verifier's processes: a server that forks workers, and what a worker is held to."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from rlzoo.errors import UserError
from rlzoo.rewards.worker import PID_BYTES

_START_SECONDS = 120.0  # imports take one second; a cold disk on a busy machine, many
_PATIENCE = 4  # wall seconds for each processor second, where other processes take their share


class WorkerServer:
    """The process that forks workers: `rlzoo.rewards.worker`."""

    def __init__(self, memory_mb: int) -> None:
        """Start it and wait until it is ready.

        Raises:
            UserError: it could not start; its own message is on stderr.
        """
        self._control, theirs = socket.socketpair()
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        # -P and -m: neither the user's folder nor rewards/, whose math.py would hide Python's
        # own, is on the path; nor is the main program imported again.
        command = [sys.executable, "-P", "-m", "rlzoo.rewards.worker"]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(memory_mb)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # a terminal's Ctrl-C goes to the main program only
        )
        theirs.close()
        self._control.settimeout(_START_SECONDS)
        try:
            self._receive(1)
        except OSError as error:
            try:  # it closes its end a moment before it has ended
                code = self._process.wait(0.0 if isinstance(error, TimeoutError) else 5.0)
            except subprocess.TimeoutExpired:
                code = None
            late = f"was not ready after {_START_SECONDS:g} s"
            how = late if code is None else f"ended with {code}"
            self.close()
            raise UserError(
                f"reward=math: the verifier's worker server {how}; what it says stands above."
                f" `{sys.executable} -c 'import math_verify'` must work, on a machine with memory"
                " and processes to spare."
            ) from error

    def fork(self) -> Worker:
        """A new worker.

        Raises:
            OSError: the server is gone.
        """
        ours, theirs = Pipe()
        socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        theirs.close()
        return Worker(int.from_bytes(self._receive(PID_BYTES), "big"), ours)

    def close(self) -> None:
        """End the server; its workers die with it."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def _receive(self, size: int) -> bytes:
        reply = self._control.recv(size, socket.MSG_WAITALL)
        if len(reply) < size:
            raise ConnectionResetError("the verifier's worker server is gone")
        return reply


@dataclass(eq=False)
class Worker:
    """A worker process; `batch` holds the answers it was sent and has not reported, in order."""

    pid: int
    connection: Connection
    batch: deque[int] = field(default_factory=deque)  # positions in the call's answers
    deadline: float = 0.0  # of the first in `batch`, seconds of time.monotonic
    last_deadline: float = 0.0  # the same, however busy the machine
    spent: float = 0.0  # processor seconds when the first in `batch` began
    answered: int = 0

    def begin(self, seconds: float) -> None:
        """The next answer of `batch` has so many processor seconds, and more of a busy machine."""
        now = time.monotonic()
        self.deadline, self.last_deadline = now + seconds, now + seconds * _PATIENCE
        self.spent = processor_seconds(self.pid)

    def overran(self, seconds: float) -> bool:
        """Whether the answer has had its seconds; if the machine kept them back, it gets them."""
        now = time.monotonic()
        left = seconds - (processor_seconds(self.pid) - self.spent)
        if now < self.deadline or now >= self.last_deadline or left <= 0:
            return now >= self.deadline
        self.deadline = min(self.last_deadline, now + max(left, 0.02))
        return False

    def kill(self) -> None:
        """End the process and drop its unread reports."""
        try:
            while self.connection.poll():
                self.connection.recv_bytes()
            os.kill(self.pid, signal.SIGKILL)
        except (EOFError, ConnectionResetError, ProcessLookupError):
            pass  # it has ended by itself, and its pid may be another process's by now
        self.connection.close()


def processor_seconds(pid: int) -> float:
    """What a process has used, in steps of 0.01 s; infinite if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
