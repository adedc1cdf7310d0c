"""Token balance over simulated ranks: who waits for whom when responses are ragged.

A rollout step has 128 prompts of 50 to 300 tokens and 1,024 responses of at most 4,096. A prompt's
acceptance rate p is uniform in [0, 1], and hard prompts write more. Lengths, in tokens:
    lognormal: log-normal of median 250 exp(1.2 (1 - p)) and sigma 0.6, cut at the limit;
    tail: a share 0.3 (1 - p)^2 of responses (10% over prompts) runs into the limit; the others are
        log-normal of median 300 and sigma 0.5.
Budgets are GVM's, from 8 pilots and log-normal gradient norms (sigma 1), no prompt over 150; the
heaviest prompt has 150.

Everything is "the slowest rank's tokens over the mean rank's", prompt and response, the worst over
seeds. Ranks wait for each other at every optimizer step, or at every microbatch where weights are
sharded (ZeRO-3, FSDP):
    update phase: waits at optimizer steps included, sum of the slowest over sum of the means;
    rollout step: as if ranks met at its end alone;
    optimizer step, microbatch: the worst single one;
    padded: update phase in slots, where rows are padded since the family cannot be packed;
    attention: update phase, tokens of an S token sequence at cost 1 + S / 18,432 (width 1,536).
The sampling phase has the tokens that a rank expects to draw and those it draws, the prompt of
every piece included. `shipped` is rlzoo's way (`rlzoo.data.shares`, every response expected at the
mean); for comparison `prompt means` expects of a prompt the mean of its 8 pilots, `single
responses` has pieces of one response, and `whole groups` balances groups by their number of
responses. What is left in `single responses` is the chance of single lengths, which nothing known
beforehand evens out.
The last line is JSON with
    slowest_over_mean: update phase, worst of all cases and seeds;
    optimizer_step_slowest_over_mean, microbatch_slowest_over_mean: the worst single ones;
    sampling_slowest_over_mean, sampling_expected_slowest_over_mean: shipped, worst case and seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlzoo.allocators.gvm import GVMBudgets, gvm_weights
from rlzoo.data.shares import Piece, share_out
from rlzoo.errors import check_at_least
from rlzoo.learning.microbatching import balance, plan_updates

LIMIT, PILOTS, LARGEST = 4096, 8, 150  # tokens; responses; responses
ATTENTION = 12 * 1536  # sequence length at which attention costs as much as the rest
BUDGETS, UPDATES = (4_096, 16_384, 65_536), (1, 4)  # tokens of a microbatch; optimizer steps

Lengths = Callable[[np.random.Generator, float, int], np.ndarray]  # (rng, accept rate, n) -> [n]


def lognormal(rng: np.random.Generator, accept_rate: float, n: int) -> np.ndarray:
    lengths = 250 * np.exp(1.2 * (1 - accept_rate) + 0.6 * rng.standard_normal(n))
    return lengths.clip(1, LIMIT).astype(int)


def tail(rng: np.random.Generator, accept_rate: float, n: int) -> np.ndarray:
    lengths = (300 * np.exp(0.5 * rng.standard_normal(n))).clip(1, LIMIT).astype(int)
    return np.where(rng.random(n) < 0.3 * (1 - accept_rate) ** 2, LIMIT, lengths)


DISTRIBUTIONS: dict[str, Lengths] = {"lognormal": lognormal, "tail": tail}


class Step(NamedTuple):
    """A made-up rollout step; prompts of budget 0 are left out."""

    prompt_tokens: list[int]  # [P]
    budgets: list[int]  # [P]
    pilots: list[np.ndarray]  # P x [PILOTS] response tokens
    lengths: list[np.ndarray]  # P x [n] response tokens


def make_step(name: str, prompts: int, responses: int, seed: int) -> Step:
    rng = np.random.default_rng(seed)
    lengths_of, accept_rates = DISTRIBUTIONS[name], rng.random(prompts)
    tokens = rng.integers(50, 301, prompts)
    accepted = rng.binomial(PILOTS, accept_rates) / PILOTS
    norms = rng.lognormal(0, 1, prompts)
    budgets = skewed_budgets(accepted, norms, responses)
    kept = [i for i, n in enumerate(budgets) if n]
    return Step(
        [int(tokens[i]) for i in kept],
        [budgets[i] for i in kept],
        [lengths_of(rng, accept_rates[i], PILOTS) for i in kept],
        [lengths_of(rng, accept_rates[i], budgets[i]) for i in kept],
    )


def skewed_budgets(accept_rates: np.ndarray, norms: np.ndarray, total: int) -> list[int]:
    """GVM's budgets of sum `total`, but LARGEST for the prompt that has most."""
    weights = gvm_weights(accept_rates, norms, 1e-3, 2.0)
    heaviest = int(weights.argmax())
    others = np.arange(len(norms)) != heaviest
    budgets = GVMBudgets(n_max=LARGEST).budgets(
        accept_rates[others], norms[others], total - LARGEST
    )
    return [*budgets[:heaviest], LARGEST, *budgets[heaviest:]]


# --- update phase -------------------------------------------------------------------------------


def ratio(loads: Tensor) -> float:
    """The slowest rank's load over the mean's; `loads` is [ranks]."""
    return float(loads.max() / loads.mean())


def waiting(loads: Tensor) -> float:
    """The same where all wait at each barrier; `loads` is [ranks, barriers]."""
    return float(loads.amax(0).sum() / loads.mean(0).sum())


def update_phase(step: Step, seed: int, ranks: int, budget: int, updates: int) -> dict[str, float]:
    """Slowest over mean, by what is waited for."""
    lengths = torch.tensor([int(n) for group in step.lengths for n in group])
    pairs = zip(step.prompt_tokens, step.budgets, strict=True)
    prompts = [tokens for tokens, responses in pairs for _ in range(responses)]
    sizes = [prompt + length for prompt, length in zip(prompts, lengths.tolist(), strict=True)]
    packed = loads(lengths, sizes, seed, ranks, budget, updates, padded=False)
    padded = loads(lengths, sizes, seed, ranks, budget, updates, padded=True)
    steps = torch.stack([load.tokens.sum(1) for load in packed], 1)  # [ranks, updates]
    return {
        "update phase": waiting(steps),
        "rollout step": ratio(steps.sum(1)),
        "optimizer step": max(map(ratio, steps.T)),
        "microbatch": max(ratio(part) for load in packed for part in load.tokens.T),
        "padded": waiting(torch.stack([load.slots.sum(1) for load in padded], 1)),
        "attention": waiting(torch.stack([load.attention.sum(1) for load in packed], 1)),
        "slots/token": float(sum(load.slots.sum() for load in padded) / steps.sum()),
    }


class Loads(NamedTuple):
    """Of an optimizer step, each [ranks, microbatches]."""

    tokens: Tensor
    slots: Tensor  # if rows are padded
    attention: Tensor


def loads(
    lengths: Tensor,
    sizes: list[int],
    seed: int,
    ranks: int,
    budget: int,
    updates: int,
    padded: bool,
) -> list[Loads]:
    """What each rank computes in each optimizer step.

    Args:
        lengths: [N] int64 response tokens.
        sizes: N, with the prompts' tokens.
    """
    found: list[list[list[tuple[float, ...]]]] = [
        [[] for _ in range(ranks)] for _ in range(updates)
    ]
    for rank in range(ranks):
        plans = plan_updates(
            [[i] for i in range(len(sizes))],
            lengths,
            sizes,
            updates=updates,
            budget=budget,
            padded=padded,
            rank=rank,
            world_size=ranks,
            aggregation="token_mean",
            max_length=LIMIT,
            seed=0,
            rollout_step=seed,
        )
        for place, parts in enumerate(plans):
            for part in parts:
                mine = torch.tensor([sizes[i] for i in part.rollouts], dtype=torch.double)
                slots = len(mine) * max(mine.tolist(), default=0)
                attention = (mine * (1 + mine / ATTENTION)).sum()
                found[place][rank].append((float(mine.sum()), slots, float(attention)))
    return [Loads(*torch.tensor(place, dtype=torch.double).movedim(-1, 0)) for place in found]


# --- sampling phase -----------------------------------------------------------------------------


class Drawn(NamedTuple):
    """The slowest rank over the mean, and all ranks over whole groups on as many."""

    expected: float
    actual: float
    read_again: float  # tokens over those with every prompt read once


def sampling_phase(step: Step, ranks: int) -> dict[str, Drawn]:
    prompts, budgets = step.prompt_tokens, step.budgets
    mean = float(np.concatenate(step.lengths).mean())
    means = [mean] * len(budgets)
    pilots = [float(group.mean()) for group in step.pilots]
    shares = share_out(prompts, budgets, mean, ranks)
    pieces = sorted(piece for share in shares for piece in share)
    single = [Piece(i, j, j + 1) for i, n in enumerate(budgets) for j in range(n)]
    whole = [[Piece(i, 0, budgets[i]) for i in part] for part in balance(budgets, ranks)]
    return {
        "shipped": drawn(step, shares, means),
        "prompt means": drawn(step, dealt(step, pieces, pilots, ranks), pilots),
        "single responses": drawn(step, dealt(step, single, means, ranks), means),
        "whole groups": drawn(step, whole, means),
    }


def dealt(
    step: Step, pieces: list[Piece], expected: Sequence[float], ranks: int
) -> list[list[Piece]]:
    costs = [step.prompt_tokens[i] + (stop - start) * expected[i] for i, start, stop in pieces]
    return [[pieces[k] for k in part] for part in balance(costs, ranks)]


def drawn(step: Step, shares: list[list[Piece]], expected: Sequence[float]) -> Drawn:
    reads = [sum(step.prompt_tokens[i] for i, _, _ in share) for share in shares]
    hoped = [sum((stop - start) * expected[i] for i, start, stop in share) for share in shares]
    written = [
        sum(float(step.lengths[i][start:stop].sum()) for i, start, stop in share)
        for share in shares
    ]
    return Drawn(
        ratio(torch.tensor(reads) + torch.tensor(hoped)),
        ratio(torch.tensor(reads) + torch.tensor(written)),
        (sum(reads) + sum(written)) / (sum(step.prompt_tokens) + sum(written)),
    )


# --- report -------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench balance")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=128, help="of a rollout step")
    parser.add_argument("--responses", type=int, default=1024, help="of a rollout step")
    parser.add_argument("--seeds", type=int, default=20, help="rollout steps of each distribution")
    args = parser.parse_args(argv)
    for key in ("ranks", "seeds"):
        check_at_least(f"--{key}", getattr(args, key), 1)
    check_at_least("--prompts", args.prompts, 2)
    check_at_least("--responses", args.responses, LARGEST)
    update: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    sampling: dict[tuple[str, str], list[Drawn]] = {}
    for name in DISTRIBUTIONS:
        for seed in range(args.seeds):
            step = make_step(name, args.prompts, args.responses, seed)
            for budget in BUDGETS:
                for updates in UPDATES:
                    found = update_phase(step, seed, args.ranks, budget, updates)
                    update.setdefault((name, budget, updates), []).append(found)
            for way, figures in sampling_phase(step, args.ranks).items():
                sampling.setdefault((name, way), []).append(figures)
    worst = {case: worst_of(found) for case, found in update.items()}
    print_update(worst)
    print_sampling(sampling)
    print(json.dumps(headline(worst, sampling)))


def worst_of(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(figures[name] for figures in found) for name in found[0]}


def print_update(worst: dict[tuple[str, int, int], dict[str, float]]) -> None:
    columns = list(next(iter(worst.values())))
    print("update phase: slowest rank over the mean, worst seed")
    print(f"{'lengths':<11}{'budget':>11}{'updates':>9}" + "".join(f"{c:>16}" for c in columns))
    for (name, budget, updates), figures in worst.items():
        row = "".join(f"{figures[column]:>16.3f}" for column in columns)
        print(f"{name:<11}{budget:>11}{updates:>9}{row}")


def print_sampling(sampling: dict[tuple[str, str], list[Drawn]]) -> None:
    print(
        "sampling phase: slowest rank over the mean; prompts read again: tokens over whole groups'"
    )
    columns = ("expected worst", "actual worst", "actual mean", "read again mean")
    print(f"{'lengths':<11}{'shares':<20}" + "".join(f"{c:>16}" for c in columns))
    for (name, way), found in sampling.items():
        figures = np.array(found)  # [seeds, 3]
        shown = (figures[:, 0].max(), figures[:, 1].max(), *figures[:, 1:].mean(0))
        print(f"{name:<11}{way:<20}" + "".join(f"{figure:>16.3f}" for figure in shown))


def headline(
    worst: dict[tuple[str, int, int], dict[str, float]],
    sampling: dict[tuple[str, str], list[Drawn]],
) -> dict[str, float]:
    top = worst_of(list(worst.values()))
    shipped = [f for (_, way), found in sampling.items() if way == "shipped" for f in found]
    figures = {
        "slowest_over_mean": top["update phase"],
        "optimizer_step_slowest_over_mean": top["optimizer step"],
        "microbatch_slowest_over_mean": top["microbatch"],
        "sampling_slowest_over_mean": max(found.actual for found in shipped),
        "sampling_expected_slowest_over_mean": max(found.expected for found in shipped),
    }
    return {name: round(figure, 4) for name, figure in figures.items()}
