"""HTTP to the replicas of a vLLM server: all of them at once, and one that dies is done without."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rlzoo.errors import UserError

log = logging.getLogger(__name__)

Call = Callable[[Any, str], Awaitable[Any]]  # (session, address) -> answer


class ReplicaLost(Exception):
    """A replica gave no answer."""


class Replicas:
    """The servers of a run.

    Args:
        addresses: such as http://localhost:8000.
        timeout: seconds after which one that does not answer is given up.
        key: sent with every request; None sends none.
        start_command: named where none of them answers.
    """

    def __init__(
        self, addresses: Sequence[str], timeout: float, key: str | None, start_command: str
    ) -> None:
        self.addresses = [address.rstrip("/") for address in addresses]
        self.timeout, self.key, self.start_command = timeout, key, start_command
        self.alive: list[str] = []

    def everywhere(self, call: Call) -> dict[str, Any]:
        """`call(session, address)` at all that are alive, at once; who does not answer is given up.

        Raises:
            UserError: none answers.
        """

        async def ask_all() -> list[Any]:
            async with self.session() as session:
                calls = (call(session, address) for address in asked)
                return await asyncio.gather(*calls, return_exceptions=True)

        asked, reason = list(self.alive), None
        answers = dict(zip(asked, asyncio.run(ask_all()), strict=True))
        for address, answer in answers.items():
            if isinstance(answer, ReplicaLost):
                reason = answer
                self.give_up(address, answer)
            elif isinstance(answer, BaseException):
                raise answer
        kept = {a: answer for a, answer in answers.items() if not isinstance(answer, ReplicaLost)}
        if not kept:
            raise UserError(
                f"None of engine.addresses={self.addresses} answers ({reason}). Start one with:"
                f" {self.start_command}"
            )
        return kept

    def answers(
        self,
        path: str,
        jobs: Sequence[dict[str, Any]],
        concurrency: int,
        on_answer: Callable[[int, dict[str, Any]], None],
    ) -> list[dict[str, Any]]:
        """Every job's answer, in order, each answered exactly once, by whoever is free.

        Args:
            path: that jobs are posted to.
            concurrency: jobs that a replica has at once.
            on_answer: called with a job's index and its answer, in the calling thread.

        Raises:
            RuntimeError: no replica is left, or one refuses a job.
        """
        answers: dict[int, dict[str, Any]] = {}
        waiting = deque(range(len(jobs)))

        async def work(session: Any, address: str) -> None:
            while waiting and address in self.alive:
                job = waiting.popleft()
                try:
                    answers[job] = await self.ask(session, f"{address}{path}", jobs[job])
                except ReplicaLost as error:
                    waiting.appendleft(job)
                    self.give_up(address, error)
                else:
                    on_answer(job, answers[job])

        async def spread() -> None:
            async with self.session() as session:
                while waiting:
                    if not self.alive:
                        raise RuntimeError(
                            f"No replica of engine.addresses={self.addresses} is left, with"
                            f" {len(waiting)} of {len(jobs)} responses missing. Start them again"
                            " and go on from the last checkpoint with ckpt_path=last."
                        )
                    places = [a for a in self.alive for _ in range(concurrency)]
                    await asyncio.gather(*(work(session, address) for address in places))

        asyncio.run(spread())
        return [answers[job] for job in range(len(jobs))]

    def give_up(self, address: str, error: Exception) -> None:
        if address in self.alive:
            self.alive.remove(address)
            log.warning(
                f"{address} no longer answers ({error}); its requests go to the"
                f" {len(self.alive)} replicas that are left, until the next weight sync."
            )

    def session(self) -> contextlib.AbstractAsyncContextManager[Any]:
        import aiohttp

        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.timeout, connect=10),
        )

    async def ask(
        self,
        session: Any,
        url: str,
        body: dict[str, Any] | None = None,
        method: str = "POST",
        with_key: bool = True,
    ) -> Any:
        """The answer's JSON.

        Args:
            with_key: whether the key is sent, if there is one.

        Raises:
            ReplicaLost: no answer, or an error of the server's own.
            RuntimeError: the server refuses the request.
            UserError: it asks for another key.
        """
        import aiohttp

        try:
            headers = bearer(self.key if with_key else None)
            async with session.request(method, url, json=body, headers=headers) as answer:
                text = await answer.text()
                if answer.status in (401, 403):
                    raise UserError(refused(url, self.key))
                if answer.status >= 500:
                    raise ReplicaLost(f"status {answer.status}: {text[:200]}")
                if answer.status >= 400:
                    raise RuntimeError(f"{url} refuses: status {answer.status}, {text[:500]}")
                return await answer.json(content_type=None) if text else None
        except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
            raise ReplicaLost(f"{type(error).__name__}: {error}") from error


def bearer(key: str | None) -> dict[str, str]:
    """The header that a key is sent in."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def refused(url: str, key: str | None) -> str:
    held = "another key than this run sends" if key else "a key, and this run sends none"
    return (
        f"{url} asks for {held}. Give both sides the same: VLLM_API_KEY in the environment of the"
        " server, and of this run the variable that engine.api_key_variable names."
    )


def key_from(variable: str) -> str | None:
    """The servers' key, from the environment alone: what is configured is written to files.

    Raises:
        UserError: a variable other than the default that is not set. The message does not repeat
            its name, which may be the key itself, by mistake.
    """
    key = os.environ.get(variable) or None
    if key is None and variable != "VLLM_API_KEY":
        raise UserError(
            "engine.api_key_variable must be the name of an environment variable that holds the"
            " servers' key (not the key itself), and no variable of that name is set."
        )
    return key
