"""Several torchrun agents that take each other for other machines, on this one.

`python -m tests.multinode.hosts [--loopback] OVERRIDES` trains on two of them, one process each: in
two network namespaces joined by a veth pair, which takes root, or on two loopback addresses. Both
share this machine's file system, as hosts of a cluster share theirs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import forked
from tests.forked import free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds for a whole run


@dataclass(frozen=True)
class Host:
    """Where an agent runs: its address, its network interface, and what to put before a command."""

    address: str
    interface: str
    prefix: tuple[str, ...] = ()


LOOPBACK = (Host("127.0.0.1", "lo"), Host("127.0.0.2", "lo"))


class NotPermitted(Exception):
    """This machine lets nobody, or not this user, make network namespaces."""


def ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotPermitted("there is no `ip` command") from error
    except subprocess.CalledProcessError as error:
        raise NotPermitted(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two network namespaces with a loopback and an interface `link0` each, joined to each other.

    They see nothing of this machine's network, nor it of theirs. Deleted in the end, come what may.

    Raises:
        NotPermitted: they cannot be made here.
    """
    names = [f"rlzoo-{os.getpid()}-{letter}" for letter in "ab"]
    hosts = [
        Host(f"10.77.0.{i}", "link0", ("ip", "netns", "exec", name))
        for i, name in enumerate(names, start=1)
    ]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ends = [["name", "link0", "netns", name] for name in names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, name in zip(hosts, names, strict=True):
            ip("-n", name, "address", "add", f"{host.address}/24", "dev", "link0")
            for device in ("lo", "link0"):
                ip("-n", name, "link", "set", device, "up")
        yield hosts[0], hosts[1]
    finally:
        for name in made:  # the veth pair goes with them
            subprocess.run(["ip", "netns", "delete", name], check=False)


@dataclass(frozen=True)
class Program:
    """A process that was started, and the file that holds what it has said."""

    process: subprocess.Popen | forked.Program
    log: Path

    def said(self) -> str:
        return self.log.read_text()


def start(command: list[str], log: Path, **variables: str) -> Program:
    """Starts a launcher in a process group of its own and in the directory of `log`."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=environment(**variables),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Program(process, log)


def start_rank(overrides: Sequence[str], log: Path, **variables: str) -> Program:
    """Starts a run likewise, with its imports behind it."""
    own = environment(**variables)
    process = forked.Program("rlzoo.run", overrides, log, cwd=log.parent, variables=own)
    return Program(process, log)


def environment(**variables: str) -> dict[str, str]:
    """This process's, but for what a launcher around these tests may have told it."""
    ours = ("SLURM_", "TORCHELASTIC_", "MASTER_", "NODE_RANK", "RLZOO_RUN_NAME")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}  # seconds before torchrun kills its ranks
    return env | variables


def agents(
    hosts: tuple[Host, ...],
    *overrides: str,
    cwd: Path,
    processes: int = 1,
    options: tuple[str, ...] = (),
) -> list[Program]:
    """Starts a torchrun agent on every host, all of one run.

    Args:
        hosts: the first one's address is where all meet.
        overrides: Hydra's.
        cwd: directory of all processes, below which `outputs/` comes.
        processes: ranks of each host.
        options: further ones of torchrun's.
    """
    port = free_port()
    started = []
    for rank, host in enumerate(hosts):
        command = [*host.prefix, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", str(len(hosts)), "--nproc-per-node", str(processes)]
        command += ["--node-rank", str(rank), "--local-addr", host.address]
        command += ["--master-addr", hosts[0].address, "--master-port", str(port), *options]
        command += ["-m", "rlzoo.run", f"trainer.devices={processes}"]
        command += [f"trainer.num_nodes={len(hosts)}", *overrides]
        log = cwd / f"terminal{rank}.txt"
        started.append(start(command, log, GLOO_SOCKET_IFNAME=host.interface))
    return started


def machines(hosts: tuple[Host, ...], *overrides: str, cwd: Path) -> list[Program]:
    """Starts Lightning's own launcher on every host, one rank each, as by hand on each machine."""
    port = str(free_port())
    command = [sys.executable, "-m", "rlzoo.run", f"trainer.num_nodes={len(hosts)}", *overrides]
    return [
        start(
            [*host.prefix, *command],
            cwd / f"terminal{rank}.txt",
            GLOO_SOCKET_IFNAME=host.interface,
            NODE_RANK=str(rank),
            MASTER_ADDR=hosts[0].address,
            MASTER_PORT=port,
        )
        for rank, host in enumerate(hosts)
    ]


def finish(programs: list[Program], expected: int = 0) -> list[str]:
    """What each of them said, once all have ended; none of them outlives this."""
    deadline = time.monotonic() + PATIENCE
    try:
        for program in programs:
            program.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        stop(programs)
    outputs = [program.said() for program in programs]
    codes = [program.process.returncode for program in programs]
    assert codes == [expected] * len(codes), f"{codes}\n" + "\n".join(outputs)
    return outputs


def stop(programs: list[Program]) -> None:
    """Ends what still runs; an agent ends its ranks, which are no part of its process group."""
    for program in programs:
        program.process.terminate()
    for program in programs:
        try:
            program.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(program.process.pid, signal.SIGKILL)
            program.process.wait()


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    overrides = [argument for argument in arguments if argument != "--loopback"]
    if len(overrides) < len(arguments):
        print(*finish(agents(LOOPBACK, *overrides, cwd=Path.cwd())), sep="\n")
        return
    with two_hosts() as hosts:
        print(*finish(agents(hosts, *overrides, cwd=Path.cwd())), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
