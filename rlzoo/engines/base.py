"""The engine protocol: token ids in, sampled responses out, weights by name and version."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlzoo.errors import UserError

log = logging.getLogger(__name__)


class Request(NamedTuple):
    """Responses wanted of one prompt: as many as there are seeds (ragged over prompts)."""

    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]  # one per response, non-negative, below 2**63
    expected: float = 0.0  # tokens of a response, as far as is known; 0 where nothing is


class Response(NamedTuple):
    token_ids: Tensor  # [L] int64, the end-of-sequence token included if one was drawn
    logprobs: Tensor  # [L] float32 nats, of the sampled tokens after temperature
    truncated: bool  # stopped by the token limit
    near_ties: int  # tokens whose uniform lay within 1e-5 of a step of the CDF


OnResponse = Callable[[int, int, Response], None]  # (index of request, of response in it, response)


class SamplingParams(NamedTuple):
    temperature: float = 1.0  # 0 is greedy
    max_response_tokens: int = 128
    top_p: float = 1.0  # tokens of the likeliest mass; 1 keeps all
    top_k: int = 0  # likeliest tokens; 0 keeps all


class Engine(Protocol):
    """What a rollout step asks of whatever draws responses.

    One that draws in another process than the trainer's says so by `beside = True`: its `generate`
    may be called from a thread while the policy trains (`pipeline=one_step`).

    Raises:
        RuntimeError: from `generate`, if the engine's weights are not `expected_version`.
    """

    version: int  # policy version of the weights held; -1 before the first load
    dtype: str  # what it computes in: float32, bfloat16, float16
    asleep: bool  # whether `sleep` gave memory back that `load_weights` must take again

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        expected_version: int,
        on_response: OnResponse | None = None,
    ) -> list[list[Response]]:
        """One list of responses per request, in order.

        Args:
            on_response: called once for each response, as it finishes and in any order, in the
                thread that called `generate`: what it does holds up the engine.
        """

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    def checksum(self) -> int | None:
        """`weights_checksum` of the weights held; equals the trainer's after a sync. None where
        they cannot be read back."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probs at temperature 1, in nats, of every token but the first of each sequence;
        asked for where there is no checksum."""

    def sleep(self) -> None:
        """Gives back the device's memory between rollouts, where there is any to give; the next
        `load_weights` takes it again."""

    def wake(self) -> None:
        """Starts what has to be started; called before every `load_weights`."""

    def close(self) -> None: ...


class Responses:
    """The responses of a draw, put in order as they finish.

    Args:
        requests: what was asked for.
        on_response: see `Engine.generate`.
    """

    def __init__(self, requests: Sequence[Request], on_response: OnResponse | None) -> None:
        self.found: list[dict[int, Response]] = [{} for _ in requests]
        self.sizes = [len(request.seeds) for request in requests]
        self.on_response = on_response or (lambda request, index, response: None)

    def add(self, request: int, index: int, response: Response) -> None:
        self.found[request][index] = response
        self.on_response(request, index, response)

    def groups(self) -> list[list[Response]]:
        """What `generate` returns; a KeyError if a response is missing."""
        pairs = zip(self.found, self.sizes, strict=True)
        return [[group[index] for index in range(size)] for group, size in pairs]


def longest_first(requests: Sequence[Request]) -> list[tuple[int, int]]:
    """(request, response in it) of all that is wanted, those expected to be the longest first, so
    that none of them is left to be drawn alone at the end."""
    order = sorted(range(len(requests)), key=lambda i: -requests[i].expected)
    return [(i, k) for i in order for k in range(len(requests[i].seeds))]


def weights_checksum(
    named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> int:
    """CRC-32 of every tensor's bytes and name, in any order; holds one tensor at a time.

    Args:
        dtype: what the tensors are converted to first, if whom they are compared with holds that.
    """
    found = []
    for name, tensor in named_tensors:
        data = tensor.detach().to(dtype=dtype).cpu().contiguous().view(torch.uint8).numpy().data
        found.append((name, zlib.crc32(data)))
    return zlib.crc32(repr(sorted(found)).encode())


def check_version(engine: Engine, expected_version: int) -> None:
    if engine.version < 0:
        raise UserError(
            "Nothing handed the policy's weights to the engine: callbacks.weight_sync is left out."
            " Put it back; it may compare nothing (callbacks.weight_sync.check=never)."
        )
    if engine.version != expected_version:
        raise RuntimeError(
            f"The engine holds policy version {engine.version}, but version {expected_version} was"
            " asked to sample: a weight sync is missing."
        )
