"""The softmax over the vocabulary in tiles, so that [tokens, V] never stands in memory whole.

A tile holds the logits of some tokens for a part of the vocabulary. One walk over all of them gives
normalizer and entropy of each token, by a softmax that runs along (arXiv:1805.02867). Whoever needs
a tile again, for a gradient, makes it again, unless all of them together are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlzoo.models.logits import PLAIN, LogitTransform

# elements of float32: 8 MiB stay in a CPU's cache, 256 MiB keep a GPU busy
TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
KEPT_ELEMENTS = 2**28  # of all logits, up to which tiles are kept for the backward walk: 1 GiB


class Head(NamedTuple):
    """The output head, or a part of it, and what is done to its output."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    dtype: torch.dtype  # that products are computed in
    temperature: float = 1.0  # logits are divided by it
    transform: LogitTransform = PLAIN

    @classmethod
    def of(cls, module: nn.Module, temperature: float, transform: LogitTransform) -> Head:
        """A linear layer's, in the precision of where it is called: autocast's, or its own."""
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        return cls(weight, bias, product_dtype(weight), temperature, transform)

    def part(self, places: slice | Tensor) -> Head:
        """The head of a part of the vocabulary, its weights cast."""
        bias = None if self.bias is None else self.bias[places].to(self.dtype)
        return self._replace(weight=self.weight[places].to(self.dtype), bias=bias)

    def parts(self, blocks: Sequence[slice]) -> Iterator[tuple[slice, Head]]:
        """Parts that make tiles of bounded size, and are no larger themselves, and their places.

        Args:
            blocks: the tokens of each row of tiles.
        """
        longest = max((block.stop - block.start for block in blocks), default=1)
        side = max(1, longest, self.weight.shape[1])
        width = max(1, tile_elements(self.weight.device) // side)
        for columns in slices(len(self.weight), width):
            yield columns, self.part(columns)

    def logits(self, hidden: Tensor) -> Tensor:
        """[m, v] float32, rounded to what products are computed in, over the temperature."""
        logits = self.transform(nn.functional.linear(hidden, self.weight, self.bias).float())
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of `logits` with respect to the output of the linear layer."""
        if self.transform.cap is None:
            return self.transform.scale / self.temperature
        return self.transform.slope(logits * self.temperature) / self.temperature


def product_dtype(weight: Tensor) -> torch.dtype:
    """What a linear layer would compute in, here and now."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def tile_elements(device: torch.device) -> int:
    return TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cuda"])


def full_precision(like: Tensor) -> torch.autocast:
    """Within it, nothing is computed in less than its own dtype."""
    return torch.autocast(like.device.type, enabled=False)


def add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other, where the product may be of half precision."""
    if one.dtype == total.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def times(tile: Tensor, slope: Tensor | float) -> Tensor:
    """The product, in place."""
    return tile.mul_(slope) if isinstance(slope, Tensor) or slope != 1 else tile


def slices(length: int, width: int) -> list[slice]:
    """A range in parts of at most `width`, all of nearly the same length."""
    count = math.ceil(length / width)
    ends = [length * i // max(1, count) for i in range(count + 1)]
    return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]


def square_blocks(tokens: Tensor) -> list[slice]:
    """Tokens in as many blocks as make tiles near to square, which products are fastest for."""
    return slices(len(tokens), square_side(tokens.device))


def square_side(device: torch.device) -> int:
    return math.isqrt(tile_elements(device))


class Places(NamedTuple):
    """Where each token of a block lies in a tile."""

    place: Tensor  # [m, 1], the first or the last if it lies outside
    inside: Tensor  # [m, 1] whether it lies in the tile

    @classmethod
    def of(cls, tokens: Tensor, columns: slice) -> Places:
        wanted = tokens[:, None] - columns.start
        place = wanted.clamp(0, columns.stop - columns.start - 1)
        return cls(place, place == wanted)

    def read(self, tile: Tensor) -> Tensor:
        """[m] the tile's value at each token; 0 where it lies outside."""
        return torch.where(self.inside, tile.gather(1, self.place), 0)[:, 0]

    def write(self, tile: Tensor, values: Tensor | float) -> None:
        """Puts a value at each token, [m, 1] or one for all, where it lies in the tile."""
        here = tile.gather(1, self.place)
        tile.scatter_(1, self.place, torch.where(self.inside, values, here))


class RunningSoftmax:
    """Normalizer and entropy of M tokens, and their own logits, from tiles one after the other.

    A token's own place is kept apart, so that 1 - p is no difference of nearly equal numbers where
    the policy is sure of its tokens.

    `top` is the largest logit so far and `own` the token's; `others` is the sum of
    exp(logit - top) over all other places, `moment` that of exp(logit - top) * (logit - top).
    """

    def __init__(self, tokens: Tensor) -> None:
        zeros = torch.zeros_like(tokens, dtype=torch.float32)
        self.others, self.moment, self.own = zeros, zeros.clone(), zeros.clone()
        self.top = torch.full_like(zeros, torch.finfo(torch.float32).min)

    def add(self, rows: slice, logits: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Takes a tile in, and overwrites it.

        Returns:
            [m, v] exp(logit - top), 0 at each token itself; and [m] what earlier tiles' have been
            multiplied by since, because `top` rose.
        """
        before, others, moment = self.top[rows], self.others[rows], self.moment[rows]
        top = torch.maximum(before, logits.amax(-1))
        shift = before - top
        decay = shift.exp()
        self.own[rows] += places.read(logits)
        logits -= top[:, None]
        weights = logits.exp()
        places.write(weights, 0.0)
        self.moment[rows] = decay * (moment + shift * others) + logits.mul_(weights).sum(-1)
        self.others[rows] = decay * others + weights.sum(-1)
        self.top[rows] = top
        return weights, decay

    @property
    def mass(self) -> Tensor:
        """[M] sum of exp(logit - top)."""
        return self.others + (self.own - self.top).exp()

    @property
    def log_norm(self) -> Tensor:
        return self.top + self.mass.log()

    @property
    def entropy(self) -> Tensor:
        above = self.own - self.top
        return self.mass.log() - (self.moment + above.exp() * above) / self.mass


def softmax_of(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    others_mean: Tensor | None = None,
    kept: list[Tensor] | None = None,
) -> RunningSoftmax:
    """One walk.

    Args:
        hidden: [M, D] in the dtype of products.
        tokens: [M].
        others_mean: [M, D] zeros, if wanted: becomes the sum, over all places but the token's own,
            of probability times slope times the head's row.
        kept: gets the logits of every tile, in the order of the walk.
    """
    running, blocks = RunningSoftmax(tokens), square_blocks(tokens)
    for columns, part in head.parts(blocks):
        for rows in blocks:
            logits = part.logits(hidden[rows])
            if kept is not None:
                kept.append(logits.clone())
            slope = 1.0 if others_mean is None else part.slope(logits)
            weights, decay = running.add(rows, logits, Places.of(tokens[rows], columns))
            if others_mean is not None:
                others_mean[rows] *= decay[:, None]
                weights = times(weights, slope).to(head.dtype)
                add_product(others_mean[rows], weights, part.weight)
    if others_mean is not None:
        others_mean /= running.mass[:, None]
    return running


def hidden_gradient(hidden: Tensor, head: Head, tokens: Tensor) -> tuple[RunningSoftmax, Tensor]:
    """One walk, and [M, D] float32 the gradient of each token's log-prob by its hidden state."""
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    found = softmax_of(hidden, head, tokens, gradient)
    own_slope = (found.others / found.mass) * head.slope(found.own)
    return found, gradient.neg_().addcmul_(head.part(tokens).weight.float(), own_slope[:, None])


def logit_gradient(
    head: Head,
    logits: Tensor,
    places: Places,
    log_norm: Tensor,
    of_logprobs: Tensor,
    of_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    """[m, v] gradient with respect to the linear layer's output, from a tile that it overwrites.

    With p the softmax, log p has the gradient 1 - p at the token itself and -p elsewhere, and the
    entropy H has -p (log p + H).

    Args:
        of_logprobs, of_entropy: [m] of the loss with respect to each token's log-prob and entropy.
    """
    slope = head.slope(logits)
    pull = of_logprobs[:, None]
    logprobs = logits.sub_(log_norm[:, None])
    if of_entropy is not None and entropy is not None:
        pull = pull + of_entropy[:, None] * (logprobs + entropy[:, None])  # [m, v]
    gradient = logprobs.exp_().mul_(-pull)
    places.write(gradient, gradient.gather(1, places.place) + of_logprobs[:, None])
    return times(gradient, slope)
