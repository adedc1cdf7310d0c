from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
from annotated_types import Ge
from lightning import Callback, LightningModule, Trainer
from torch._C._distributed_c10d import TCPStore

from rlzoo.callbacks.preemption import Preempted
from rlzoo.engines import isolation
from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather, exchange_timeout, world
from rlzoo.ranks.whereabouts import HERE
from rlzoo.values import Positive

BEAT = 1.0  # seconds between two signs of life
PATIENCE, PATIENCE_OVER_NETWORK = 30.0, 120.0  # seconds; a switch may be away for a minute
SHORTLY_BEFORE = 0.95  # of the time-out of an exchange: the run ends with a word of ours
LOST_RANK = 70  # exit code of a run that lost a rank
SYMPTOMS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out",
    "NCCL",
)


class RankWatch(Callback):
    """Ends every rank soon after one has died, and says which: without it the others would wait for
    that rank until the process group's time-out.

    Each rank gives a sign of life every second, from a thread, through a store that rank 0 keeps.
    The ranks of one machine also learn from its kernel when another has ended: Lightning looks at
    the processes that it started every five seconds, and kills them all, rank 0 included, without a
    word to the terminal if one of them has failed. So that it does not, they outlive rank 0.

    A sign of life says where its rank is (`rlzoo.ranks.whereabouts`). Where all are alive but none
    moves on, since they wait in different exchanges or one hangs, rank 0 says which rank is where;
    shortly before the exchange would time out, that is the run's last word.

    Args:
        patience: seconds without a sign after which a rank counts as dead, at least 5; None is
            PATIENCE on one machine and PATIENCE_OVER_NETWORK on several.
        stall: seconds in which no rank moves on after which it is said where each one is.
    """

    def __init__(
        self, patience: Annotated[float, Ge(5)] | None = None, stall: Positive = 120.0
    ) -> None:
        if not stall > 0:
            raise UserError(f"callbacks.rank_watch.stall must be above 0 s, got {stall}.")
        self.patience, self.stall = patience or PATIENCE, stall
        self.chosen = patience is not None
        self.limit = float("inf")  # seconds of standing still after which the run is ended
        self.notice = stall  # seconds of standing still at which it is said next
        self.moves: dict[int, tuple[str, float]] = {}  # by rank: where it is, and since when
        self.done = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self) -> None:
        """Starts the watch; collective."""
        rank, size = world()
        if size == 1 or self.thread is not None:
            return
        if not self.chosen and len(set(all_gather(socket.gethostname()))) > 1:
            self.patience = PATIENCE_OVER_NETWORK
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=self.patience)
        port = None
        if rank == 0:
            self.server = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            port = self.server.port
        port = all_gather(port)[0]
        self.store = TCPStore(host, port, is_master=False, timeout=timeout)
        names = all_gather(f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        self.names, self.rank = names, rank
        assert dist.group.WORLD is not None
        self.limit = SHORTLY_BEFORE * exchange_timeout(dist.group.WORLD).total_seconds()
        places = all_gather((process_namespace(), os.getpid()))
        self.neighbours = open_neighbours(rank, places)
        self.started_by_first = 0 in self.neighbours and places[0][1] == os.getppid()
        self.thread = threading.Thread(target=self.watch, daemon=True, name="rank-watch")
        self.thread.start()
        threading.Thread(target=self.watch_neighbours, daemon=True, name="neighbours").start()

    def watch(self) -> None:
        seen = {other: ("", time.monotonic()) for other in range(len(self.names))}
        beats = 0
        while not self.done.wait(BEAT):
            beats += 1
            lost = self.look(beats, seen)
            if lost is not None:
                self.stop(lost)

    def look(self, beats: int, seen: dict[int, tuple[str, float]]) -> str | None:
        """One round: our sign, and what is wrong with the others, if anything."""
        try:
            self.store.set(f"beat/{self.rank}", f"{beats}|{HERE.count}|{HERE}")
            for other in seen:
                found = self.last_word(other)
                if found != seen[other][0]:
                    seen[other] = (found, time.monotonic())
                quiet = time.monotonic() - seen[other][1]
                if found.startswith("failed:") and quiet > 3 * BEAT:
                    return f"{self.names[other]} failed: {found.removeprefix('failed:')}."
                if quiet > self.patience and found != "done":
                    return f"{self.names[other]} gave no sign of life for {quiet:.0f} s."
        except (RuntimeError, OSError):  # rank 0's store is gone, and so is rank 0
            return f"{self.names[0]} is gone."
        return self.standing_still({other: found for other, (found, _) in seen.items()})

    def standing_still(self, words: dict[int, str]) -> str | None:
        """Says, on rank 0, that no rank moves on; returns it where that has lasted too long.

        Args:
            words: each rank's last word.
        """
        now = time.monotonic()
        for rank, word in words.items():
            moved = word.partition("|")[2]
            if rank not in self.moves or self.moves[rank][0] != moved:
                self.moves[rank] = moved, now
        if not all("|" in word for word in words.values()):
            return None  # one has not begun, or has ended
        still = now - max(since for _, since in self.moves.values())
        if still < self.stall:
            self.notice = self.stall
            return None
        places = "; ".join(
            f"{self.names[rank]} {moved.partition('|')[2]} since {now - since:.0f} s"
            for rank, (moved, since) in self.moves.items()
        )
        waiting = any("waits for" in moved for moved, _ in self.moves.values())
        if waiting and still >= self.limit:
            return f"No rank has moved on for {still:.0f} s: {places}."
        if self.rank == 0 and still >= self.notice:
            self.notice = 2 * still
            say(f"no rank has moved on for {still:.0f} s: {places}.")
        return None

    def watch_neighbours(self) -> None:
        """Waits for ranks of this machine to end; one that said why is left to `look`."""
        ranks, poll = {fd: rank for rank, fd in self.neighbours.items()}, select.poll()
        for fd in ranks:
            poll.register(fd, select.POLLIN)
        while ranks and not self.done.is_set():
            for fd, _ in poll.poll():
                poll.unregister(fd)
                rank, word = ranks.pop(fd), ""
                with contextlib.suppress(RuntimeError, OSError):  # rank 0's store went with it
                    word = self.last_word(rank)
                if not word.startswith(("failed:", "done")):
                    self.stop(f"{self.names[rank]} is gone.")

    def last_word(self, rank: int) -> str:
        """A rank's last sign of life; RuntimeError or OSError if the store is gone."""
        key = f"beat/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def stop(self, reason: str) -> None:
        """Ends this rank, unless it is ending by itself."""
        if not self.done.is_set():
            say(f"{reason} Stopping; go on with ckpt_path=last.")
            os._exit(LOST_RANK)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tells the others why; or, where the exception only says that a peer is gone, waits until
        it is known who, and ends with that."""
        if self.thread is None:
            return
        if isinstance(exception, Preempted):  # so are all
            self.on_train_end(trainer, pl_module)
        else:
            mine = isinstance(exception, UserError)
            if not mine and any(symptom in str(exception) for symptom in SYMPTOMS):
                self.thread.join(self.patience + 10)
            self.close(f"failed:{type(exception).__name__}")
        if self.started_by_first:
            select.select([self.neighbours[0]], [], [], self.patience)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.thread is not None:
            self.close("done")
            all_gather("done")  # rank 0 keeps the store until all have said so

    def close(self, last_word: str) -> None:
        self.done.set()
        if self.thread is not None:
            self.thread.join(2 * BEAT)
        try:
            self.store.set(f"beat/{self.rank}", last_word)
        except (RuntimeError, OSError):
            pass  # nobody is left to read it


def process_namespace() -> str:
    """Equal for processes whose process numbers mean the same; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def open_neighbours(rank: int, places: list[tuple[str, int]]) -> dict[int, int]:
    """File descriptors that become readable when another rank of this machine ends, by rank.

    Args:
        places: of each rank, its process namespace and number.
    """
    found = {}
    for other, (namespace, pid) in enumerate(places):
        if other != rank and namespace and namespace == places[rank][0]:
            with contextlib.suppress(OSError):  # gone already, or a kernel without these
                found[other] = os.pidfd_open(pid)
    return found


def say(message: str) -> None:
    isolation.say(f"rlzoo: {message}")  # also while vLLM starts, whose words go to its log
