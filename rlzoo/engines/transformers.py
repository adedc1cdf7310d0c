"""`engine=transformers`: our own batched decode loop over a transformers model.

The reference engine: the same modules as the trainer's, so that the gap in log-probs is rounding
alone, on any device. Each response's noise is its own counter-based stream, turned into tokens by
inverse CDF; so a response does not depend on who it was batched with, but where rounding decides
(counted as `near_ties`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
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
from rlzoo.engines.decoding import choose_decoder
from rlzoo.engines.shapes import checked_weights
from rlzoo.models.logprobs import sequence_logprobs
from rlzoo.models.packed import check_placed
from rlzoo.models.policy import without_lora
from rlzoo.rng import uniforms
from rlzoo.types import PolicyFactory
from rlzoo.values import AtLeast1, Device

NEAR_TIE = 1e-5  # width, in probability, within which rounding may decide a token
DROP_SHARE = 1 / 8  # share of finished rows at which the cache is compacted


@dataclass
class Rows:
    """The responses being decoded together: R rows, each with its own noise."""

    request: np.ndarray  # [R] index of the request
    noise: Tensor  # [R, max_response_tokens] float64 uniforms
    tokens: Tensor  # [R, max_response_tokens] int64
    logprobs: Tensor  # [R, max_response_tokens] float32
    lengths: Tensor  # [R] int64, 0 while the row is being decoded
    near_ties: Tensor  # [R] int64


class TransformersEngine:
    """Draws responses with a copy of the policy of its own.

    Args:
        policy: builds the model, here without adapters; its weights are replaced at the first sync.
        eos_token_ids: any of them ends a response.
        pad_token_id: fills prompts on the left.
        max_rows: responses decoded at once; the rest wait. Bounds memory.
        device: "auto" takes CUDA where there is one.
    """

    def __init__(
        self,
        policy: PolicyFactory,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_rows: AtLeast1 = 512,
        device: Device = "auto",
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device, self.max_rows, self.pad_token_id = torch.device(device), max_rows, pad_token_id
        self.model = without_lora(policy)().eval().to(self.device).requires_grad_(False)
        self.stop_ids = torch.tensor(sorted(eos_token_ids), device=self.device)
        self.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        check_placed(self.model)
        self.decoder = choose_decoder(self.model, pad_token_id)
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
        places = [(i, k) for i, request in enumerate(requests) for k in range(len(request.seeds))]
        for start in range(0, len(places), self.max_rows):
            self._decode(requests, places[start : start + self.max_rows], params, responses)
        return responses.groups()

    def _decode(
        self,
        requests: Sequence[Request],
        wave: list[tuple[int, int]],
        params: SamplingParams,
        responses: Responses,
    ) -> None:
        """Decodes (request, response) pairs together: each prompt is prefilled once, and rows leave
        as they finish."""
        limit, (num, device) = params.max_response_tokens, (len(wave), self.device)
        noise = np.stack([uniforms(requests[i].seeds[k], limit) for i, k in wave])
        rows = Rows(
            request=np.array([request for request, _ in wave]),
            noise=torch.from_numpy(noise).to(device),
            tokens=torch.zeros(num, limit, dtype=torch.long, device=device),
            logprobs=torch.zeros(num, limit, device=device),
            lengths=torch.zeros(num, dtype=torch.long, device=device),
            near_ties=torch.zeros(num, dtype=torch.long, device=device),
        )
        unique, prompt_of_row = np.unique(rows.request, return_inverse=True)
        decoder = self.decoder(self.model, self.pad_token_id)
        logits = decoder.prefill([requests[i].token_ids for i in unique], limit)
        expand = torch.from_numpy(prompt_of_row).to(device)
        decoder.take_rows(expand)
        logits = logits[expand]
        alive = torch.arange(num, device=device)  # rows still in the cache
        for step in range(limit):
            token, logprob, tie = draw(logits, rows.noise[alive, step], params)
            going = rows.lengths[alive] == 0
            rows.tokens[alive, step], rows.logprobs[alive, step] = token, logprob
            rows.near_ties[alive] += tie & going
            ended = going & (torch.isin(token, self.stop_ids) | (step == limit - 1))
            rows.lengths[alive[ended]] = step + 1
            for row in alive[ended].tolist():
                request, index = wave[int(row)]
                responses.add(request, index, _response(rows, row, self.stop_ids))
            going &= ~ended
            if not going.any():
                break
            if going.sum() <= (1 - DROP_SHARE) * len(alive):
                kept = going.nonzero()[:, 0]
                decoder.take_rows(kept)
                alive, token = alive[kept], token[kept]
            logits = decoder.step(token)


def draw(logits: Tensor, noise: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF, or the likeliest one at temperature 0.

    Args:
        logits: [R, V] float32.
        noise: [R] float64 uniforms in [0, 1).
        params: logits are divided by the temperature, then tokens outside of top-k and top-p are
            left out; temperature 0 is greedy, with log-probs at temperature 1.

    Returns:
        tokens [R] int64, log-probs [R] float32, near ties [R] bool: whether the uniform lies
        within NEAR_TIE of a step of the cumulative distribution.
    """
    logprobs = truncated(logits / (params.temperature or 1.0), params).log_softmax(-1)
    if params.temperature == 0:
        top = logits.topk(2, dim=-1)
        token = top.indices[:, 0]
        tie = top.values[:, 0] - top.values[:, 1] < NEAR_TIE
    else:
        cdf = logprobs.double().exp().cumsum(-1)
        target = (noise * cdf[:, -1])[:, None]
        token = torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
        above = cdf.gather(1, token[:, None]) - target
        below = target - cdf.gather(1, (token - 1).clamp(min=0)[:, None])
        tie = ((above < NEAR_TIE) & (token < cdf.shape[1] - 1)[:, None])[:, 0]
        tie |= ((below < NEAR_TIE) & (token > 0)[:, None])[:, 0]
    return token, logprobs.gather(1, token[:, None])[:, 0], tie


def truncated(logits: Tensor, params: SamplingParams) -> Tensor:
    """[R, V] logits, -inf for tokens outside of the top k and of the top p."""
    if not 0 < params.top_k < logits.shape[-1] and params.top_p >= 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of likelier tokens
    out = before >= params.top_p
    if params.top_k:
        out[:, params.top_k :] = True
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)


def _response(rows: Rows, index: int, stop_ids: Tensor) -> Response:
    length = int(rows.lengths[index])
    tokens = rows.tokens[index, :length]
    return Response(
        token_ids=tokens.cpu().clone(),
        logprobs=rows.logprobs[index, :length].cpu().clone(),
        truncated=not bool(torch.isin(tokens[-1], stop_ids)),
        near_ties=int(rows.near_ties[index]),
    )
