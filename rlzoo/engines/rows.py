"""The responses that are being drawn together: their tokens so far, and the noise to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlzoo.engines.base import Response
from rlzoo.rng import uniforms


class Waiting(NamedTuple):
    """A response that is to be drawn."""

    request: int
    number: int  # among the responses of the request
    seed: int


class Rows:
    """R rows, each in one of a number of places, which it leaves to another when it is dropped.

    Args:
        places: rows at once.
        limit: tokens of a response.
        stop_ids: any of them ends a response.
    """

    def __init__(self, places: int, limit: int, stop_ids: Tensor) -> None:
        self.stop_ids, self.limit, device = stop_ids, limit, stop_ids.device
        self.owner: dict[int, Waiting] = {}  # by place
        self.noise = torch.zeros(places, limit, dtype=torch.float64, device=device)  # uniforms
        self.tokens = torch.zeros(places, limit, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(places, limit, device=device)
        self.lengths = torch.zeros(places, dtype=torch.long, device=device)
        self.near_ties = torch.zeros(places, dtype=torch.long, device=device)
        self.places = torch.zeros(0, dtype=torch.long, device=device)  # [R]
        self.last = torch.zeros(0, dtype=torch.long, device=device)  # [R] token of each row
        self.going = torch.zeros(0, dtype=torch.bool, device=device)  # [R] not ended
        self.num_going = 0

    def which_go(self) -> Tensor:
        """[G] numbers of the rows that have not ended."""
        if self.num_going == len(self.going):
            return torch.arange(self.num_going, device=self.going.device)
        return self.going.nonzero()[:, 0]

    def replace(self, kept: Tensor, new: Sequence[Waiting]) -> Tensor:
        """Drops all rows but some, and puts new ones behind these: [N] numbers of the new ones."""
        places = self.places[kept]
        free = sorted(set(range(len(self.lengths))) - set(places.tolist()))[: len(new)]
        self.owner.update(zip(free, new, strict=True))
        taken = torch.tensor(free, dtype=torch.long, device=places.device)
        if new:
            noise = np.stack([uniforms(waiting.seed, self.limit) for waiting in new])
            self.noise[taken] = torch.from_numpy(noise).to(self.noise.device)
        self.lengths[taken] = 0
        self.near_ties[taken] = 0
        self.places = torch.cat([places, taken])
        self.last = torch.cat([self.last[kept], torch.zeros_like(taken)])
        self.going = torch.ones_like(self.places, dtype=torch.bool)
        self.num_going = len(self.going)
        return torch.arange(len(places), self.num_going, device=places.device)

    def next_noise(self, rows: Tensor) -> Tensor:
        """[G] float64: the uniforms of the rows' next tokens."""
        places = self.places[rows]
        return self.noise[places, self.lengths[places]]

    def add(
        self, rows: Tensor, token: Tensor, logprob: Tensor, near_tie: Tensor
    ) -> list[tuple[Waiting, Response]]:
        """Gives rows a token each: the responses that it ends."""
        places = self.places[rows]
        at = self.lengths[places]
        self.tokens[places, at], self.logprobs[places, at] = token, logprob
        self.lengths[places] = at + 1
        self.near_ties[places] += near_tie
        self.last[rows] = token
        stopped = self.stops(places, token)
        ended = (stopped | (at + 1 == self.limit)).nonzero()[:, 0]
        self.going[rows[ended]] = False
        self.num_going -= len(ended)
        pairs = zip(places[ended].tolist(), (~stopped[ended]).tolist(), strict=True)
        return [(self.owner[place], self._response(place, cut)) for place, cut in pairs]

    def stops(self, places: Tensor, token: Tensor) -> Tensor:
        """[G] bool: whether a row's last token, in one of these places, is an end token."""
        return torch.isin(token, self.stop_ids)

    def _response(self, place: int, truncated: bool) -> Response:
        length = int(self.lengths[place])
        return Response(
            token_ids=self.tokens[place, :length].to("cpu", copy=True),
            logprobs=self.logprobs[place, :length].to("cpu", copy=True),
            truncated=truncated,
            near_ties=int(self.near_ties[place]),
        )
