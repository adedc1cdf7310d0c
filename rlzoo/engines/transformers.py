"""`engine=transformers`: our own batched decode loop over a transformers model.

The reference engine: the same modules as the trainer's, so that the gap in log-probs is rounding
alone, on any device. Each response's noise is its own counter-based stream, turned into tokens by
inverse CDF; so a response does not depend on who it was batched with, but where rounding decides
(counted as `near_ties`).

All responses that are asked for stand in one queue, those expected to be the longest first. As soon
as a share of the rows has ended, the next in the queue take their place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlzoo.engines.base import (
    OnResponse,
    Request,
    Response,
    Responses,
    SamplingParams,
    check_version,
    weights_checksum,
)
from rlzoo.engines.decoding import Decoder, choose_decoder
from rlzoo.engines.drawing import draw
from rlzoo.engines.rows import Rows, Waiting
from rlzoo.engines.shapes import checked_weights
from rlzoo.models.logits import transform_of, vocabulary_size
from rlzoo.models.logprobs import sequence_logprobs
from rlzoo.models.packed import check_placed
from rlzoo.models.policy import without_lora
from rlzoo.models.precision import DTYPES
from rlzoo.types import PolicyFactory
from rlzoo.values import AtLeast1, Device, Precision

LEFT_SHARE = 1 / 8  # share of ended rows at which they leave and others take their place
PREFILL_TOKENS = 2**14  # of prompts that go through the model at once, padding included
LOGITS = 2**26  # made at once, elements of float32 (256 MiB)
DRAWN = {"cpu": 2**22}  # of these, turned into tokens at once: a CPU goes over them several times


class Prefilled(NamedTuple):
    """Prompts that have been through the model."""

    decoder: Decoder  # with a row of each
    hidden: Tensor  # [P, D] predict the first tokens
    requests: list[int]  # whose they are


class Prompts:
    """Where rows begin: each prompt goes through the model once, however many responses it has and
    whenever these begin.

    Args:
        requests: all of a draw.
        new_decoder: makes one without rows.
    """

    def __init__(self, requests: Sequence[Request], new_decoder: Callable[[], Decoder]) -> None:
        self.requests, self.new_decoder = requests, new_decoder
        self.held: Prefilled | None = None  # the prompt whose responses begin now and later

    def begin(
        self, new: Sequence[Waiting], following: int | None
    ) -> tuple[list[tuple[Decoder, Tensor]], list[Tensor], list[Waiting]]:
        """What new responses begin with.

        Args:
            new: those of a request stand together.
            following: the request of the response after them.

        Returns:
            decoders with the rows to take of them; hidden states of these, [n, D]; whose each is.
        """
        groups = {i: [*group] for i, group in groupby(new, key=lambda waiting: waiting.request)}
        found = [self.held] if self.held and self.held.requests[0] in groups else []
        self.held = None
        known = {i for prefilled in found for i in prefilled.requests}
        found += self._prefill(sorted(groups.keys() - known, key=self._longest_first))
        parts: list[tuple[Decoder, Tensor]] = []
        hidden: list[Tensor] = []
        for decoder, states, requests in found:
            sizes = torch.tensor([len(groups[i]) for i in requests], device=states.device)
            rows = torch.arange(len(requests), device=states.device).repeat_interleave(sizes)
            parts.append((decoder, rows))
            hidden.append(states[rows])
            if following in requests:
                self.held = self._alone(decoder, states, requests, following)
        owners = [waiting for part in found for i in part.requests for waiting in groups[i]]
        return parts, hidden, owners

    def _longest_first(self, request: int) -> tuple[int, int]:
        return -len(self.requests[request].token_ids), request

    def _prefill(self, wanted: list[int]) -> Iterator[Prefilled]:
        """Requests' prompts, the longest first."""
        while wanted:
            size = max(1, PREFILL_TOKENS // len(self.requests[wanted[0]].token_ids))
            piece, wanted = wanted[:size], wanted[size:]
            decoder = self.new_decoder()
            hidden = decoder.prefill([self.requests[i].token_ids for i in piece])
            yield Prefilled(decoder, hidden, piece)

    def _alone(
        self, decoder: Decoder, hidden: Tensor, requests: list[int], request: int
    ) -> Prefilled:
        """One prompt of several."""
        if len(requests) == 1:
            return Prefilled(decoder, hidden, requests)
        row = torch.tensor([requests.index(request)], device=hidden.device)
        alone = self.new_decoder()
        alone.join((decoder, row))
        return Prefilled(alone, hidden[row], [request])


class TransformersEngine:
    """Draws responses with a copy of the policy of its own.

    Args:
        policy: builds the model, here without adapters; its weights are replaced at the first sync.
        eos_token_ids: any of them ends a response.
        pad_token_id: fills prompts on the left.
        max_rows: responses decoded at once; the rest wait. "auto" is 512 here; the launch puts in
            its place what fits.
        device: "auto" takes CUDA where there is one.
        precision: the trainer's. What it computes in bfloat16, the copy is held and computed in.
    """

    def __init__(
        self,
        policy: PolicyFactory,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_rows: AtLeast1 | Literal["auto"] = "auto",
        device: Device = "auto",
        precision: Precision = "32-true",
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device, self.pad_token_id = torch.device(device), pad_token_id
        self.max_rows = 512 if max_rows == "auto" else max_rows
        self.model = without_lora(policy)().eval().to(self.device).requires_grad_(False)
        self.stop_ids = torch.tensor(sorted(eos_token_ids), device=self.device)
        check_placed(self.model)
        self.decoder = choose_decoder(self.model, pad_token_id)  # before any rounding
        if dtype := DTYPES.get(str(precision).partition("-")[0]):
            for parameter in self.model.parameters():  # not buffers: see `float_buffers`
                parameter.data = parameter.data.to(dtype)
        self.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        self.version, self.asleep = -1, False

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        own = dict(self.model.named_parameters())
        shapes = {name: parameter.shape for name, parameter in own.items()}
        for name, tensor in checked_weights(named_tensors, shapes):
            own[name].data.copy_(tensor)
        self.version = version

    def checksum(self) -> int:
        return weights_checksum(self.model.named_parameters())

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        return sequence_logprobs(self.model, sequences, self.device)

    def sleep(self) -> None:
        if self.device.type != "cpu":
            self.model.to("cpu")
            self.asleep = True

    def wake(self) -> None:
        self.model.to(self.device)
        self.asleep = False

    def close(self) -> None:
        pass

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        expected_version: int,
        on_response: OnResponse | None = None,
    ) -> list[list[Response]]:
        check_version(self, expected_version)
        responses = Responses(requests, on_response)
        for waiting, response in self._drawn(requests, params):
            responses.add(waiting.request, waiting.number, response)
        return responses.groups()

    def _drawn(
        self, requests: Sequence[Request], params: SamplingParams
    ) -> Iterator[tuple[Waiting, Response]]:
        """Every response that is asked for, as it ends."""
        order = sorted(range(len(requests)), key=lambda i: -requests[i].expected)
        queue = deque(Waiting(i, k, s) for i in order for k, s in enumerate(requests[i].seeds))
        rows = Rows(min(self.max_rows, len(queue)), params.max_response_tokens, self.stop_ids)
        prompts, decoder = Prompts(requests, self._new_decoder), self._new_decoder()
        while queue or rows.num_going:
            if rows.num_going <= (1 - LEFT_SHARE) * len(rows.going):
                kept = rows.which_go()
                new = [queue.popleft() for _ in range(min(len(queue), self.max_rows - len(kept)))]
                parts, states, owners = prompts.begin(new, queue[0].request if queue else None)
                decoder.join((decoder, kept), *parts)
                begun = rows.replace(kept, owners)
                if new:
                    yield from self._draw(torch.cat(states), begun, rows, params)
            if rows.num_going:
                hidden = decoder.step(rows.last, rows.going)
                going = rows.which_go()
                yield from self._draw(hidden[going], going, rows, params)

    def _draw(
        self, hidden: Tensor, which: Tensor, rows: Rows, params: SamplingParams
    ) -> list[tuple[Waiting, Response]]:
        """Gives rows a token each, predicted by [G, D] hidden states: the responses that end."""
        noise, head = rows.next_noise(which), self.model.get_output_embeddings()
        at_once, drawn = max(1, LOGITS // vocabulary_size(head)), []
        for states, uniforms in zip(hidden.split(at_once), noise.split(at_once), strict=True):
            logits = transform_of(self.model)(head(states).float())  # [G, V]
            some = max(1, DRAWN.get(self.device.type, LOGITS) // logits.shape[1])
            pieces = zip(logits.split(some), uniforms.split(some), strict=True)
            drawn += [draw(piece, noise, params) for piece, noise in pieces]
        token, logprob, near_tie = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
        return rows.add(which, token, logprob, near_tie)

    def _new_decoder(self) -> Decoder:
        return self.decoder(self.model, self.pad_token_id)
