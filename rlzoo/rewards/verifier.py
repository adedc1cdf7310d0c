"""Math rewards from a pool of worker processes that can be killed (docs/verifier.md).

Answers come from models and may be hostile. Each has its own wall limit and memory cap; what hits
one costs its worker, never another answer's verdict.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge

from rlzoo.rewards.base import Scores, Verdict
from rlzoo.rewards.boxes import shorten
from rlzoo.rewards.processes import Worker, WorkerServer
from rlzoo.types import Prompt
from rlzoo.values import AtLeast1

_NO_ANSWER = r"\boxed{\text{no answer at all}}"
_BATCH = 16  # answers sent at once; a message costs about as much as the shortest answer


def workers_for(processes: int) -> int:
    """Verifier workers of each of so many processes of a machine: the cores that this one may use,
    shared between them; at least 1, at most 16."""
    return min(16, max(1, len(os.sched_getaffinity(0)) // processes))


class VerifierPool:
    """Verdicts on answers, by `rlzoo.rewards.math.verdict` in worker processes.

    Starts at the first `verify`; `close`, or leaving it as a context manager, ends the processes,
    and a later `verify` starts them again. They end with the main program however it ends. Usable
    from any thread, one call at a time.

    Args:
        num_workers: worker processes of each rank; "auto" is `workers_for(processes)`.
        seconds_per_answer: processor seconds of each answer; one that takes longer is UNVERIFIABLE
            and costs its worker, whose other answers go to the next. On a busy machine, at most
            four times as many seconds of wall time.
        memory_mb: MiB a worker may take on top of what it starts with; an answer that asks for
            more is UNVERIFIABLE.
        max_answer_chars: longest answer that is looked at, in characters. If the response has a
            box, that is the box's content however long the response; else the whole response.
            Longer ones, and answers to longer gold answers, are UNVERIFIABLE at no cost.
        recycle_after: answers after which a worker is replaced, since sympy's caches grow.
        processes: of the run on each machine, which share its cores.
    """

    def __init__(
        self,
        *,
        num_workers: AtLeast1 | Literal["auto"] = "auto",
        seconds_per_answer: Annotated[float, Ge(0.01)] = 2.0,
        memory_mb: Annotated[int, Ge(16)] = 1024,
        max_answer_chars: AtLeast1 = 20_000,
        recycle_after: AtLeast1 = 20_000,
        processes: AtLeast1 = 1,
    ) -> None:
        self.num_workers = workers_for(processes) if num_workers == "auto" else num_workers
        self.seconds_per_answer = seconds_per_answer
        self.memory_mb, self.max_answer_chars = memory_mb, max_answer_chars
        self.recycle_after = recycle_after
        self.unparsed_places: list[int] = []  # of the last call's golds
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._server: WorkerServer | None = None
        self._workers: list[Worker] = []

    def verify(
        self,
        golds: Sequence[str],
        responses: Sequence[str],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Verdict]:
        """One verdict per pair, in their order.

        Args:
            golds: gold answers, one per response, with or without a box.
            responses: whole responses, or answers in a box.
            on_progress: called with the number of verdicts known so far.

        Raises:
            ValueError: not as many gold answers as responses.
            UserError, OSError: the workers cannot be started.
        """
        if len(golds) != len(responses):
            raise ValueError(f"{len(golds)} gold answers for {len(responses)} responses")
        with self._lock:
            try:
                return self._verify(golds, responses, on_progress or (lambda done: None))
            except BaseException:
                self._stop()  # their reports would be taken for the next call's
                raise

    def close(self) -> None:
        """End the worker processes; a later call starts them again."""
        with self._lock:
            self._stop()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _verify(
        self, golds: Sequence[str], responses: Sequence[str], on_progress: Callable[[int], None]
    ) -> list[Verdict]:
        self.unparsed_places = []
        verdicts = [Verdict.UNVERIFIABLE] * len(responses)
        answers = [shorten(response) for response in responses]
        longest = [max(len(g), len(a)) for g, a in zip(golds, answers, strict=True)]
        waiting = deque(i for i, size in enumerate(longest) if size <= self.max_answer_chars)
        if not waiting:
            on_progress(len(verdicts))
        while waiting or any(worker.batch for worker in self._workers):
            if waiting:
                self._fill_pool()
            for worker in self._workers:
                if waiting and not worker.batch:
                    share = -(-len(waiting) // (2 * self.num_workers))
                    batch = [waiting.popleft() for _ in range(min(_BATCH, share))]
                    self._send(worker, batch, [(golds[i], answers[i]) for i in batch])
            self._receive(verdicts, waiting)
            unknown = len(waiting) + sum(len(worker.batch) for worker in self._workers)
            on_progress(len(verdicts) - unknown)
        return verdicts

    def _send(self, worker: Worker, batch: list[int], pairs: list[tuple[str, str]]) -> None:
        worker.batch.extend(batch)
        worker.begin(self.seconds_per_answer)
        try:
            worker.connection.send(pairs)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died: seen as any death when its reports are read

    def _receive(self, verdicts: list[Verdict], waiting: deque[int]) -> None:
        """Wait for reports, then drop the workers that died, overran or have served their time.

        Reports are read before deadlines are checked: if this process was held up, answers that
        were in time are not blamed for it.
        """
        busy = [worker for worker in self._workers if worker.batch]
        first_deadline = min(worker.deadline for worker in busy)
        timeout = max(0.0, first_deadline - time.monotonic())
        ready = wait([worker.connection for worker in busy], timeout)
        for worker in busy:
            if worker.connection in ready:
                is_alive = self._read_reports(worker, verdicts)
            else:
                is_alive = not worker.overran(self.seconds_per_answer)
            if not is_alive:
                worker.batch.popleft()  # the one it was at: UNVERIFIABLE
                waiting.extendleft(reversed(worker.batch))
            if not is_alive or (not worker.batch and worker.answered >= self.recycle_after):
                worker.kill()
                self._workers.remove(worker)

    def _read_reports(self, worker: Worker, verdicts: list[Verdict]) -> bool:
        """Whether the worker lives, or has answered all it was sent."""
        try:
            while worker.batch and worker.connection.poll():
                verdict = Verdict(worker.connection.recv_bytes()[0])
                position = worker.batch.popleft()
                verdicts[position] = verdict
                if verdict is Verdict.UNVERIFIABLE:  # a worker that lives says it of golds alone
                    self.unparsed_places.append(position)
                worker.answered += 1
                worker.begin(self.seconds_per_answer)
        except (EOFError, ConnectionResetError):
            return False
        return True

    def _fill_pool(self) -> None:
        if self._owner != os.getpid():  # forked: the workers belong to the parent process
            self._server, self._workers, self._owner = None, [], os.getpid()
        # An idle worker says nothing: what can be read is the end of its pipe.
        for worker in [w for w in self._workers if not w.batch and w.connection.poll()]:
            worker.kill()
            self._workers.remove(worker)
        while len(self._workers) < self.num_workers:
            if self._server is None:
                self._server = WorkerServer(self.memory_mb)
                atexit.register(self.close)
            try:
                worker = self._server.fork()
            except OSError:  # the server was killed, and its workers with it
                self._server.close()
                self._server = WorkerServer(self.memory_mb)
                worker = self._server.fork()
            self._workers.append(worker)

    def _stop(self) -> None:
        if self._owner == os.getpid():
            for worker in self._workers:
                worker.kill()
            if self._server is not None:
                self._server.close()
                atexit.unregister(self.close)
        self._server, self._workers = None, []


class MathReward(VerifierPool):
    """A pool that is a reward: 1 for a right final answer, 0 for any other; the verdict tells wrong
    from unverifiable.

    After a call, `unparsed_golds` has the prompt's id for each response that is unverifiable
    because its gold answer cannot be parsed.

    Args:
        truncated_is_wrong: a response cut off at the length limit is WRONG unseen. Otherwise it
            is judged as it stands, as in the reference code, and a result on the way may count.
        shared: see `VerifierPool`.
    """

    by_response = True

    def __init__(self, *, truncated_is_wrong: bool = False, **shared: Any) -> None:
        super().__init__(**shared)
        self.truncated_is_wrong = truncated_is_wrong
        self.unparsed_golds: list[str] = []

    def __call__(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        truncated: Sequence[bool],
        on_progress: Callable[[int], None] | None = None,
    ) -> Scores:
        """As any `Reward`; raises ValueError if prompts, texts and truncated differ in length."""
        if not len(prompts) == len(texts) == len(truncated):
            raise ValueError(f"{len(prompts)} prompts, {len(texts)} texts, {len(truncated)} flags")
        unseen = truncated if self.truncated_is_wrong else [False] * len(texts)
        judged = [i for i, is_unseen in enumerate(unseen) if not is_unseen]
        verdicts = torch.full((len(texts),), int(Verdict.WRONG), dtype=torch.int8)  # [N]
        golds, responses = [prompts[i].answer for i in judged], [texts[i] for i in judged]
        num_unseen = len(texts) - len(judged)
        report = on_progress and (lambda num_known: on_progress(num_unseen + num_known))
        known = self.verify(golds, responses, report)
        verdicts[judged] = torch.tensor(known, dtype=torch.int8)
        self.unparsed_golds = [prompts[judged[i]].id for i in self.unparsed_places]
        return Scores((verdicts == int(Verdict.RIGHT)).float(), verdicts)

    def unparsed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts whose gold answer cannot be parsed: only its very words would be right."""
        self.verify([p.answer for p in prompts], [_NO_ANSWER] * len(prompts))
        return [prompts[i] for i in sorted(self.unparsed_places)]
