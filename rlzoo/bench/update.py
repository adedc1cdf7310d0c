"""What an update computes beside real tokens, and how often it computes each of them.

    python -m rlzoo.bench update [--responses 8192] [--trained 48] [--seeds 3]

Lengths are log-normal: responses of median 688 tokens, cut at 3,072 (a mean of 925, 3% cut), after
prompts of 150. Slots are what goes through the backbone, paddings and blank rows included.

- *planned*: the microbatches of `--responses` rollouts, as the planner makes them for 1 and for 8
  ranks, in 1 and in 4 updates, of 16,384 tokens each; packed, and padded as a family is that cannot
  be packed.
- *trained*: `--trained` of them through a whole rollout step of GRPO on a model of two layers, at 1
  and at 8 ranks (each in its turn). Hooks on a layer count slots and passes, forward and
  recomputed ones alike.

The last line is JSON:
    slots_over_tokens: the worst of all that is packed; bar 1.05;
    padded_slots_over_tokens: the worst of what is padded;
    forward_passes, forward_passes_checkpointed: passes a token in an update; bars 1 and 2;
    microbatches_over_fewest: microbatches of a rank over those that its tokens would fill.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from transformers import PreTrainedModel

from rlzoo.algos import GRPO
from rlzoo.bench._tiny_models import tiny_model
from rlzoo.errors import check_at_least
from rlzoo.learning.microbatching import Plan, plan_updates
from rlzoo.models.packed import why_not
from rlzoo.types import Prompt, Rollouts

MEDIAN, SIGMA, LIMIT, PROMPT = 688, 0.82, 3_072, 150  # tokens; of the logarithm; tokens; tokens
GROUP, BUDGET, RANKS, UPDATES = 8, 16_384, (1, 8), (1, 4)


def lengths(responses: int, seed: int) -> torch.Tensor:
    """[responses] int64, response tokens."""
    drawn = MEDIAN * np.exp(SIGMA * np.random.default_rng(seed).standard_normal(responses))
    return torch.from_numpy(drawn.clip(1, LIMIT).astype(np.int64))


# --- planned --------------------------------------------------------------------------------------


def planned(responses: int, seed: int, ranks: int, updates: int, padded: bool) -> dict[str, float]:
    """Slots over tokens of all ranks, and microbatches over the fewest that could be."""
    found = lengths(responses, seed)
    sizes = [PROMPT + n for n in found.tolist()]
    slots, parts, fewest = 0, 0, 0.0
    for rank in range(ranks):
        steps: list[list[Plan]] = plan_updates(
            [[i] for i in range(responses)],
            found,
            sizes,
            updates=updates,
            budget=BUDGET,
            padded=padded,
            rank=rank,
            world_size=ranks,
            aggregation="token_mean",
            max_length=LIMIT,
            seed=0,
            rollout_step=seed,
        )
        for plan in (plan for plans in steps for plan in plans):
            mine = [sizes[i] for i in plan.rollouts] or [2]  # a blank row has two slots
            slots += len(mine) * max(mine) if padded else sum(mine)
            parts += 1
            fewest += sum(mine) / BUDGET
    return {"slots_over_tokens": slots / sum(sizes), "microbatches_over_fewest": parts / fewest}


# --- trained --------------------------------------------------------------------------------------


def rollouts_of(responses: int, seed: int) -> Rollouts:
    """A rollout step of made-up tokens, half of them right."""
    found = lengths(responses, seed).tolist()
    ids = [torch.full((n,), 2) for n in found]
    count = -(-responses // GROUP)
    prompts = [Prompt(str(i), "", "", token_ids=(3,) * PROMPT) for i in range(count)]
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(responses) // GROUP,
        responses=ids,
        sampler_logprobs=[torch.full((n,), -1.0) for n in found],
        truncated=torch.tensor([n == LIMIT for n in found]),
        rewards=(torch.arange(responses) % 2).float(),
        verdicts=torch.zeros(responses, dtype=torch.int8),
        policy_version=1,
        rollout_step=1,
    )


def policy(checkpointing: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    made = tiny_model("qwen2", max_position_embeddings=PROMPT + LIMIT)
    made.train()
    reason = why_not(made)
    assert reason is None, reason
    if checkpointing:
        made.gradient_checkpointing_enable()
    return made


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Slots of each pass through the model's last layer."""
    (*_, layer) = model.base_model.get_submodule("layers").children()
    seen: list[int] = []

    def count(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments[0].shape[0] * arguments[0].shape[1])

    handle = layer.register_forward_pre_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def trained(responses: int, seed: int, ranks: int, checkpointing: bool) -> float:
    """Slots of all passes of an update's ranks over its real tokens."""
    algo = GRPO(
        lambda: policy(checkpointing),
        lambda groups: torch.optim.SGD(groups, lr=1e-3),
        tokens_per_microbatch=BUDGET,
        max_response_tokens=LIMIT,
    )
    algo.configure_model()
    rollouts = rollouts_of(responses, seed)
    units = algo.training_units(rollouts)
    algo.scores_old = False  # one update: old log-probs come from the training pass
    tokens = sum(rollouts.num_tokens(i) for i in range(len(rollouts)))
    with counted(algo.policy) as seen:
        for rank in range(ranks):
            algo.trainer = SimpleNamespace(  # type: ignore[assignment]  # what the step asks for
                world_size=ranks, global_rank=rank, precision_plugin=Precision()
            )
            for update in algo.plan_updates(
                rollouts, units, algo.credit(rollouts), rank=rank, world_size=ranks
            ):
                for part in update.parts():
                    algo.training_step(part, 0).backward()
    return sum(seen) / tokens


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench update")
    parser.add_argument("--responses", type=int, default=8192, help="of the planned steps")
    parser.add_argument("--trained", type=int, default=48, help="responses that are trained on")
    parser.add_argument("--seeds", type=int, default=3, help="draws of lengths")
    args = parser.parse_args(argv)
    for key in ("responses", "trained", "seeds"):
        check_at_least(f"--{key}", getattr(args, key), 1)
    worst: dict[bool, dict[str, float]] = {}
    for padded in (False, True):
        print(f"planned, {'padded' if padded else 'packed'}: ranks, updates, slots over tokens")
        for ranks in RANKS:
            for updates in UPDATES:
                cases = [
                    planned(args.responses, seed, ranks, updates, padded)
                    for seed in range(args.seeds)
                ]
                found = {name: max(case[name] for case in cases) for name in cases[0]}
                print(f"{ranks:>4} {updates:>4} " + " ".join(f"{x:.4f}" for x in found.values()))
                before = worst.setdefault(padded, found)
                worst[padded] = {name: max(found[name], before[name]) for name in found}
    passes = {
        (ranks, checkpointing): trained(args.trained, 0, ranks, checkpointing)
        for ranks in RANKS
        for checkpointing in (False, True)
    }
    for (ranks, checkpointing), slots in passes.items():
        print(f"trained, ranks {ranks}, gradient checkpointing {checkpointing}: {slots:.4f}")
    once = max(passes[ranks, False] for ranks in RANKS)
    figures = {
        "slots_over_tokens": max(worst[False]["slots_over_tokens"], once),
        "padded_slots_over_tokens": worst[True]["slots_over_tokens"],
        "forward_passes": once,
        "forward_passes_checkpointed": max(passes[ranks, True] for ranks in RANKS),
        "microbatches_over_fewest": worst[False]["microbatches_over_fewest"],
    }
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))
