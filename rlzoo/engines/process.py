"""`engine=transformers_process`: the engine of `engine=transformers` in a process of its own on the
CPU, so that it can draw while the policy trains (`pipeline=one_step`).

Both processes hold the same weights, in one block of shared memory: the trainer's writes them while
nothing is drawn, the other's draws with them. Requests and responses go through a pipe.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers.utils.logging import disable_progress_bar

from rlzoo.engines.base import (
    OnResponse,
    Request,
    Response,
    Responses,
    SamplingParams,
    check_version,
)
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.errors import UserError
from rlzoo.types import PolicyFactory
from rlzoo.values import AtLeast1, Precision, Threads

ALIGNED = 64  # bytes; each tensor begins at a multiple, as if it had memory of its own

CHECKSUM = "checksum"  # asks the process for its weights'
END_SECONDS = 10.0  # that the process has to end by itself


class EngineProcess(TransformersEngine):
    """Draws as TransformersEngine does, in another process.

    Args:
        policy, eos_token_ids, pad_token_id, max_rows, precision: see TransformersEngine.
        num_threads: torch's threads of that process; None leaves torch's choice.
    """

    beside = True

    def __init__(
        self,
        policy: PolicyFactory,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_rows: AtLeast1 | Literal["auto"] = "auto",
        precision: Precision = "32-true",
        num_threads: Threads | None = None,
    ) -> None:
        taken = (policy, list(eos_token_ids), pad_token_id, max_rows, "cpu", precision)
        super().__init__(*taken)
        make = partial(TransformersEngine, *taken)
        parameters = list(self.model.parameters())
        block = torch.empty(sum(map(room, parameters)), dtype=torch.uint8).share_memory_()
        for parameter, place in zip(parameters, places(parameters, block), strict=True):
            place.copy_(parameter.data)
        move_into(parameters, block)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._start = partial(context.Process, target=serve, name="rlzoo-engine")
        self._arguments = (theirs, block, make, num_threads)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._draws = False  # at this moment

    def wake(self) -> None:
        if self._process is None:
            self._process = self._start(args=self._arguments)
            self._process.start()
            self._arguments[0].close()  # so that its end is seen
            atexit.register(self._process.kill)  # before multiprocessing waits for it

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        expected_version: int,
        on_response: OnResponse | None = None,
    ) -> list[list[Response]]:
        check_version(self, expected_version)
        responses, self._draws = Responses(requests, on_response), True
        self._connection.send((list(requests), params, expected_version))
        while (message := self._receive()) is not None:
            request, index, token_ids, logprobs, *rest = message
            found = Response(torch.from_numpy(token_ids), torch.from_numpy(logprobs), *rest)
            responses.add(request, index, found)
        self._draws = False
        return responses.groups()

    def checksum(self) -> int:
        """Of what the other process draws with."""
        self._connection.send(CHECKSUM)
        found: int = self._receive()
        return found

    def _receive(self) -> Any:
        """What the process says next; raises what it raised."""
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(
                "The engine's process has ended while it drew (killed, or out of memory?)."
            ) from error
        if isinstance(message, Exception):
            raise message
        return message

    def close(self) -> None:
        if self._process is not None:
            if not self._draws:
                self._connection.close()
                self._process.join(END_SECONDS)
            self._process.kill()
            self._process.join()
            atexit.unregister(self._process.kill)


def serve(
    connection: Connection,
    block: Tensor,
    make: Callable[[], TransformersEngine],
    num_threads: int | None,
) -> None:
    """The engine's process: draws what it is asked for, until the pipe closes.

    Args:
        block: holds the weights, in the order of `model.parameters()`.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the trainer's to handle
        signal.signal(number, signal.SIG_IGN)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    disable_progress_bar()  # of loading weights, which has been seen
    engine = make()
    move_into(list(engine.model.parameters()), block)

    def tell(request: int, index: int, found: Response) -> None:
        tensors = found.token_ids.numpy(), found.logprobs.numpy()
        connection.send((request, index, *tensors, found.truncated, found.near_ties))

    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if asked == CHECKSUM:
            connection.send(engine.checksum())
            continue
        requests, params, engine.version = asked
        try:
            engine.generate(requests, params, engine.version, tell)
        except BrokenPipeError:
            return
        except UserError as error:
            connection.send(error)
        except Exception:
            said = traceback.format_exc()
            connection.send(RuntimeError(f"The engine's process failed:\n{said}"))
        else:
            connection.send(None)


def room(parameter: Tensor) -> int:
    """Bytes that a tensor has in the block."""
    return -(-parameter.nbytes // ALIGNED) * ALIGNED


def places(parameters: Sequence[Tensor], block: Tensor) -> Iterable[Tensor]:
    """Each parameter's part of the block, of its shape and dtype."""
    starts = itertools.accumulate(map(room, parameters), initial=0)
    for parameter, start in zip(parameters, starts, strict=False):
        part = block[start : start + parameter.nbytes]
        yield part.view(parameter.dtype).view(parameter.shape)


def move_into(parameters: Sequence[Parameter], block: Tensor) -> None:
    """Makes the block their memory; what it holds becomes their values."""
    for parameter, place in zip(parameters, places(parameters, block), strict=True):
        parameter.data = place
