"""From selected rollouts to microbatches: who trains together, and what each token weighs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from rlzoo.rng import derive_seed
from rlzoo.types import Credit, RolloutBatch, Rollouts, collate

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "fixed_length"]
AGGREGATIONS = get_args(Aggregation)
AUTO_TOKENS = 16384  # of a microbatch, where nothing has told how many fit


class TokenWeights(NamedTuple):
    per_token: Tensor  # [n] float32, weight of each response token of a rollout
    divisor: float  # what the optimizer step's weighted sum is divided by


def token_weights(
    lengths: Tensor, rollout_weights: Tensor, aggregation: str, max_length: int
) -> TokenWeights:
    """Weights of one optimizer step's tokens, over all its microbatches and ranks.

    Args:
        lengths: [n] int64 response tokens.
        rollout_weights: [n] float32; 1 but for samplers that weigh rollouts (GVM).
        aggregation: one of AGGREGATIONS (docs/formulas.md 2; fixed_length is Dr. GRPO's, which
            divides by `max_length` whatever was drawn).
        max_length: longest response allowed, tokens.
    """
    lengths = lengths.double().clamp(min=1)
    weights = rollout_weights.double()
    if aggregation == "token_mean":
        per_token, divisor = weights, (weights * lengths).sum()
    elif aggregation == "seq_mean_token_mean":
        per_token, divisor = weights / lengths, weights.sum()
    elif aggregation == "seq_mean_token_sum":
        per_token, divisor = weights, weights.sum()
    elif aggregation == "fixed_length":
        per_token, divisor = weights / max_length, weights.sum()
    else:
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
    return TokenWeights(per_token.float(), float(divisor))


def split_updates(num_units: int, updates: int, seed: int) -> list[list[int]]:
    """Deals units (rollouts or pairs) out to optimizer steps, seeded, as evenly as can be."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(num_units)
    return [part.tolist() for part in np.array_split(order, updates)]


def balance(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Splits items into `parts` of nearly equal cost: the dearest first, to the lightest part.

    Greedy, so the heaviest part is at most 4/3 of the best possible (Graham 1969).

    Returns:
        Indices into `costs`; a part may be empty.
    """
    split: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0.0, part) for part in range(parts)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(heap)
        split[part].append(item)
        heapq.heappush(heap, (load + costs[item], part))
    return split


class Size(NamedTuple):
    """Of what must not be split: a rollout, or a pair of them."""

    rows: int
    longest: int  # tokens of its longest row, prompt included
    tokens: int  # of all its rows


def in_bins(
    sizes: Sequence[Size], ranks: int, budget: int, padded: bool = False
) -> list[list[list[int]]]:
    """Shares an optimizer step out to ranks, by tokens, then each share to microbatches.

    Ranks come first because they wait for each other at the end of the step. All have as many
    microbatches, which is as many as the one that needs most: where weights are sharded, every
    pass is an exchange that all take part in.

    Args:
        budget: tokens of a microbatch. One that holds a single item may have more.
        padded: whether rows will be padded to the longest of their microbatch, so that the budget
            is of slots, and rows of like length go together.

    Returns:
        For each rank its microbatches, each as indices into `sizes`; one may be empty.
    """
    shares = balance([size.tokens for size in sizes], ranks)
    split = [(alike if padded else even)([sizes[i] for i in share], budget) for share in shares]
    count = max(map(len, split))
    if not padded:  # no rank has an empty one, if it has enough to share out
        split = [
            parts if len(parts) == count else balance([sizes[i].tokens for i in share], count)
            for share, parts in zip(shares, split, strict=True)
        ]
    found = [
        [[share[i] for i in part] for part in parts]
        for share, parts in zip(shares, split, strict=True)
    ]
    return [parts + [[]] * (count - len(parts)) for parts in found]


def even(sizes: Sequence[Size], budget: int) -> list[list[int]]:
    """Parts of at most `budget` tokens each, of nearly as many tokens: as few as can be, or from
    the 64th on a few more, so that the search stays short."""
    tokens = [size.tokens for size in sizes]
    limit = max([budget, *tokens])
    count = max(1, -(-sum(tokens) // limit))
    while True:
        parts = balance(tokens, count)
        if max(sum(tokens[i] for i in part) for part in parts) <= limit:
            return parts
        count = min(count + 1 + count // 64, len(tokens))


def alike(sizes: Sequence[Size], budget: int) -> list[list[int]]:
    """Parts of like length, of at most `budget` slots each once rows are padded."""
    parts: list[list[int]] = [[]]
    rows, width = 0, 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i].longest, i)):
        if parts[-1] and (rows + sizes[i].rows) * width > budget:
            parts.append([])
            rows = 0
        width = width if parts[-1] else sizes[i].longest
        parts[-1].append(i)
        rows += sizes[i].rows
    return parts


class Plan(NamedTuple):
    """One microbatch of this rank: which rollouts, and what a token of each weighs."""

    rollouts: list[int]
    per_token: Tensor  # [len(rollouts)] float32
    divisor: float


def plan_updates(
    units: Sequence[Sequence[int]],
    lengths: Tensor,
    num_tokens: Sequence[int],
    weights: Tensor | None = None,
    *,
    updates: int,
    passes: int = 1,
    budget: int,
    padded: bool = False,
    rank: int,
    world_size: int,
    aggregation: str,
    max_length: int,
    seed: int,
    rollout_step: int,
) -> list[list[Plan]]:
    """The microbatches of this rank in each of `passes * updates` optimizer steps.

    Every rank makes the whole plan of the same rollouts and keeps its own part, so neither divisors
    nor the number of microbatches need communication.

    Args:
        units: indices of the rollouts that train, those that must not be split together.
        lengths: [N] int64 response tokens of every rollout.
        num_tokens: N, with the prompts' tokens.
        weights: [N] float32, what each rollout counts for; None is 1.
        updates: optimizer steps of a pass over the units.
        passes: times that all units are trained on, each time in another order.
        budget, padded: see `in_bins`.
    """
    weights = torch.ones(len(lengths)) if weights is None else weights
    sizes = [size_of([num_tokens[i] for i in unit]) for unit in units]
    steps = []
    for pass_ in range(passes):
        order = derive_seed(seed, "updates", rollout_step, pass_)
        for update in split_updates(len(units), updates, order):
            index = torch.tensor([i for u in update for i in units[u]], dtype=torch.long)
            token = token_weights(lengths[index], weights[index], aggregation, max_length)
            per_token = dict(zip(index.tolist(), token.per_token, strict=True))
            plans = []
            for part in in_bins([sizes[u] for u in update], world_size, budget, padded)[rank]:
                mine = [i for place in part for i in units[update[place]]]
                stacked = torch.stack([per_token[i] for i in mine]) if mine else torch.zeros(0)
                plans.append(Plan(mine, stacked, token.divisor))
            steps.append(plans)
    return steps


def size_of(tokens: Sequence[int]) -> Size:
    """Size of rows that stay together, from the tokens of each."""
    return Size(len(tokens), max(tokens), sum(tokens))


def microbatch(rollouts: Rollouts, plan: Plan, credit: Credit, pad_token_id: int) -> RolloutBatch:
    """The rollouts of a plan with their weights, credit and scores, padded.

    Raises:
        RuntimeError: a rollout was not scored, or not every token of it.
    """
    by_token = {**rollouts.scores, **credit.targets}
    rows = []
    for i, weight, row in zip(
        plan.rollouts, plan.per_token, rollouts.rows(plan.rollouts), strict=True
    ):
        scores = {name: values[i] for name, values in by_token.items()}
        for name, found in scores.items():
            if len(found) != len(row.response_ids):
                raise RuntimeError(
                    f"Rollout {i} has {len(row.response_ids)} response tokens and {len(found)}"
                    f" scores {name}: what trains must be among what was scored."
                )
        tokens = {**row.tokens, **scores, "weights": weight, "advantages": credit.advantages[i]}
        rows.append(row._replace(tokens=tokens))
    return collate(rows, pad_token_id, plan.divisor, by_token)


def of_like_length(
    rollouts: Rollouts, indices: Sequence[int], max_tokens: int, ranks: int
) -> list[list[int]]:
    """Rollouts of like length together, within a token limit, for passes that train nothing: as
    many lists as a multiple of `ranks`, so some may be empty."""
    lists: list[list[int]] = []
    width = 0
    for i in sorted(indices, key=lambda i: -rollouts.num_tokens(i)):
        if not lists or (len(lists[-1]) + 1) * width > max_tokens:
            lists.append([])
            width = rollouts.num_tokens(i)
        lists[-1].append(i)
    return lists + [[]] * (-len(lists) % ranks)
