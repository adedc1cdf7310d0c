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


def balance_ranks(costs: Sequence[float], ranks: int, accumulate: int) -> list[list[int]]:
    """Splits an optimizer step over ranks, then each rank's share over its microbatches.

    Ranks come first because they wait for each other at the end of the step: what one of them has
    in all matters more than what is in a microbatch.

    Returns:
        `ranks * accumulate` parts, those of a rank together; indices into `costs`.
    """
    parts = []
    for share in balance(costs, ranks):
        inner = balance([costs[i] for i in share], accumulate)
        parts += [[share[place] for place in part] for part in inner]
    return parts


class Plan(NamedTuple):
    """One microbatch of this rank: which rollouts, and what a token of each weighs."""

    rollouts: list[int]
    per_token: Tensor  # [len(rollouts)] float32
    divisor: float


def plan_microbatches(
    units: Sequence[Sequence[int]],
    lengths: Tensor,
    num_tokens: Sequence[int],
    weights: Tensor | None = None,
    *,
    updates: int,
    passes: int = 1,
    accumulate: int,
    rank: int,
    world_size: int,
    aggregation: str,
    max_length: int,
    seed: int,
    rollout_step: int,
) -> list[Plan]:
    """Exactly `passes * updates * accumulate` microbatches for this rank, balanced by tokens.

    Every rank makes the whole plan of the same rollouts and keeps its own part, so divisors need
    no communication.

    Args:
        units: indices of the rollouts that train, those that must not be split together.
        lengths: [N] int64 response tokens of every rollout.
        num_tokens: N, with the prompts' tokens.
        weights: [N] float32, what each rollout counts for; None is 1.
        updates: optimizer steps of a pass over the units.
        passes: times that all units are trained on, each time in another order.
        accumulate: microbatches per optimizer step and rank.
    """
    weights = torch.ones(len(lengths)) if weights is None else weights
    costs = [sum(num_tokens[i] for i in unit) for unit in units]
    plans = []
    for pass_ in range(passes):
        order = derive_seed(seed, "updates", rollout_step, pass_)
        for update in split_updates(len(units), updates, order):
            index = torch.tensor([i for u in update for i in units[u]], dtype=torch.long)
            token = token_weights(lengths[index], weights[index], aggregation, max_length)
            per_token = dict(zip(index.tolist(), token.per_token, strict=True))
            parts = balance_ranks([costs[u] for u in update], world_size, accumulate)
            for part in parts[rank * accumulate : (rank + 1) * accumulate]:
                mine = [i for place in part for i in units[update[place]]]
                stacked = torch.stack([per_token[i] for i in mine]) if mine else torch.zeros(0)
                plans.append(Plan(mine, stacked, token.divisor))
    return plans


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
