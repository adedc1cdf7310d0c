"""Who draws what: each rank's share of a draw, of nearly equal expected tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from rlzoo.learning.microbatching import balance

GRAIN = 16  # pieces of a rank's share, at least; more even out lengths, and prefill more prompts


class Piece(NamedTuple):
    """Responses `start` to `stop - 1` of one prompt, which one rank draws together."""

    prompt: int  # index into the prompts of the draw
    start: int
    stop: int


def share_out(
    prompt_tokens: Sequence[int], budgets: Sequence[int], response_tokens: float, num_ranks: int
) -> list[list[Piece]]:
    """The share of each rank in a draw, balanced by expected tokens.

    A group that is more than 1 / GRAIN of a rank's share is cut into pieces, so that no rank has
    all of a prompt whose responses turn out long. Each piece prefills its prompt anew.

    Args:
        prompt_tokens: [P] tokens of each prompt, prefilled once a piece.
        budgets: [P] responses wanted of each prompt, >= 1.
        response_tokens: expected tokens of a response, above 0.
        num_ranks: >= 1.

    Returns:
        Pieces of each rank, in order; together they hold every response once. A rank alone has
        whole groups.
    """
    costs = [p + n * response_tokens for p, n in zip(prompt_tokens, budgets, strict=True)]
    grain = math.fsum(costs) / (num_ranks * GRAIN)
    pieces = []
    for prompt, (cost, n) in enumerate(zip(costs, budgets, strict=True)):
        # A piece writes at least as many tokens as it reads.
        worthwhile = int(n * response_tokens / max(1, prompt_tokens[prompt]))
        count = max(1, min(num_ranks, n, math.ceil(cost / grain), worthwhile))
        cuts = [n * k // count for k in range(count + 1)]
        pieces += [Piece(prompt, *cut) for cut in itertools.pairwise(cuts)]
    sizes = [prompt_tokens[i] + (stop - start) * response_tokens for i, start, stop in pieces]
    return [sorted(pieces[k] for k in share) for share in balance(sizes, num_ranks)]
