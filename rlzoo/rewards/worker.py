"""The verifier's worker server: `python -m rlzoo.rewards.worker SOCKET MEMORY_MB`.

Started by `rlzoo.rewards.verifier`. It imports math-verify once and forks a worker for each
descriptor it is sent, so that replacing a killed worker takes milliseconds. It imports neither
torch nor the main program. Server and workers end with the process that started them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection

from rlzoo.rewards.latex import parse_in_two_stages
from rlzoo.rewards.math import verdict

PID_BYTES = 4
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Parsed before the first fork: the grammar's tables are built as they are needed, and inherited.
_WARM_UP = (
    r"\boxed{0.5}",
    "it is 2.",
    r"\boxed{3x^2 - x(x+1)}",
    r"\boxed{2\sqrt{3} + \pi}",
    r"\boxed{\left(1, \frac{2}{3}\right)}",
    r"\boxed{\{1, 2\}}",
    r"\boxed{[1, \infty)}",
    r"\boxed{y = 2x + 1}",
    r"\boxed{\text{east}}",
    r"\boxed{50\%}",
)
_POLL_SECONDS = 1.0  # how soon a server whose socket a fork still holds open sees its parent gone


class OutOfMemory(BaseException):
    """Stands in for MemoryError, which math-verify catches and takes for a wrong answer."""


def serve(control: socket.socket, memory_mb: int) -> None:
    """Fork one worker per descriptor received over `control` and answer with its pid."""
    parent = os.getppid()
    control.settimeout(_POLL_SECONDS)
    while os.getppid() == parent:
        try:
            request, descriptors, *_ = socket.recv_fds(control, 1, 1)
        except TimeoutError:
            continue
        if not request:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            _work_then_exit(Connection(descriptors[0]), memory_mb)
        os.close(descriptors[0])
        control.sendall(pid.to_bytes(PID_BYTES, "big"))


def work(connection: Connection) -> None:
    """Answer each list of (gold, response) with one byte per pair, as soon as it is known."""
    while True:
        try:
            pairs = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        for gold, response in pairs:
            connection.send_bytes(bytes([verdict(gold, response)]))


def limit_memory(memory_mb: int) -> None:
    """Let this process grow by `memory_mb` MiB; what asks for more raises OutOfMemory."""
    with open("/proc/self/statm") as statm:
        baseline = int(statm.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = baseline + memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    # The interpreter reads this pointer whenever an allocation fails.
    pointer = ctypes.c_void_p.in_dll(ctypes.pythonapi, "PyExc_MemoryError")
    pointer.value = id(OutOfMemory)


def _work_then_exit(connection: Connection, memory_mb: int) -> None:
    status = 1
    try:
        # Dies with the server even in the middle of an endless simplification.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_memory(memory_mb)
        work(connection)
        status = 0
    except (OutOfMemory, BrokenPipeError):
        pass  # the parent sees the pipe close; or it is the one that went
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)  # never back into the server's loop


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main program's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    logging.disable(logging.CRITICAL)  # math-verify warns that its time-outs are off
    descriptor, memory_mb = map(int, argv)
    control = socket.socket(fileno=descriptor)
    parse_in_two_stages()
    for response in _WARM_UP:
        verdict(r"\frac{1}{2}", response)
    control.sendall(b"r")  # ready
    serve(control, memory_mb)


if __name__ == "__main__":
    main(sys.argv[1:])
