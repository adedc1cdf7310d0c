"""What an update computes beside real tokens, and how often it computes each of them.

    OMP_NUM_THREADS=1 python -m rlzoo.bench update [--responses 8192] [--trained 256] [--seeds 3]

Lengths are log-normal: responses of median 688 tokens, cut at 3,072 (a mean of 925, 3% cut), after
prompts of 150. Slots are what goes through the backbone, paddings and blank rows included.
Nothing is timed; one thread, since threads gain nothing on layers of this size.

- *planned*: the microbatches of `--responses` rollouts, as the planner makes them for 1 and for 8
  ranks, in 1 and in 4 updates, of 16,384 tokens each; packed, and padded as a family is that cannot
  be packed. Packed ones have no padding by construction: what can be off is a blank row of a rank
  that has nothing, a rollout that is planned twice or never, and the number of microbatches.
- *trained*: `--trained` of them through an update of GRPO on a model of two layers, at 1 and at 8
  ranks (each in its turn), with several microbatches a rank. What goes through its layers is
  counted: slots, and, apart from them, calls; forward and recomputed ones alike. Lightning has no
  part in it: `tests/test_work_counts.py` counts whole rollout steps.

The last line is JSON:
    slots_over_tokens: the worst of all that is packed, planned or trained; bar 1.05;
    padded_slots_over_tokens: the worst of what is padded;
    forward_passes, forward_passes_checkpointed: calls of a layer for the microbatch of a token,
        mean over tokens; bars 1 and 2;
    trained_microbatches: of a rank, the fewest;
    microbatches_over_fewest: microbatches of a rank over those that its tokens would fill.
"""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.plugins.precision import Precision
from transformers import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from rlzoo.algos import GRPO
from rlzoo.bench._slots import slots_counted
from rlzoo.bench._tiny_models import tiny_model
from rlzoo.bench.balance import loads
from rlzoo.errors import check_at_least
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
    steps = loads(found, sizes, seed, ranks, BUDGET, updates, padded)
    blank = 2 * sum(int((load.tokens == 0).sum()) for load in steps)  # slots of rows without tokens
    computed = sum(float((load.slots if padded else load.tokens).sum()) for load in steps) + blank
    parts = sum(load.tokens.numel() for load in steps)
    return {
        "slots_over_tokens": computed / sum(sizes),
        "microbatches_over_fewest": parts * BUDGET / (sum(sizes) + blank),
    }


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


class Passes(NamedTuple):
    """What an update made a layer compute, all ranks together."""

    slots: float  # over real tokens, of all passes
    calls: float  # of a layer, for the microbatch of a token; mean over tokens
    microbatches: int  # of the rank with the fewest


def trained(responses: int, seed: int, ranks: int, checkpointing: bool) -> Passes:
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
    layers, calls, microbatches = algo.policy.config.num_hidden_layers, 0, []
    with slots_counted(of=Qwen2DecoderLayer) as counts:
        for rank in range(ranks):
            algo.trainer = SimpleNamespace(  # type: ignore[assignment]  # what the step asks for
                world_size=ranks, global_rank=rank, precision_plugin=Precision()
            )
            (update,) = algo.plan_updates(
                rollouts, units, algo.credit(rollouts), rank=rank, world_size=ranks
            )
            microbatches.append(len(update.microbatches))
            for part in update.parts():
                before = counts["passes/all"]
                algo.training_step(part, 0).backward()
                (batch,) = part.microbatches
                real = int(batch.prompt_lengths.sum() + batch.response_mask.sum())
                calls += (counts["passes/all"] - before) * real
    return Passes(counts["slots/all"] / layers / tokens, calls / layers / tokens, min(microbatches))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench update")
    parser.add_argument("--responses", type=int, default=8192, help="of the planned steps")
    parser.add_argument("--trained", type=int, default=256, help="responses that are trained on")
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
    print("trained: ranks, gradient checkpointing, slots over tokens, calls, microbatches")
    for (ranks, checkpointing), (slots, calls, microbatches) in passes.items():
        print(f"{ranks:>4} {checkpointing!s:>6} {slots:.4f} {calls:.4f} {microbatches}")
    once = max(passes[ranks, False].slots for ranks in RANKS)
    figures = {
        "slots_over_tokens": max(worst[False]["slots_over_tokens"], once),
        "padded_slots_over_tokens": worst[True]["slots_over_tokens"],
        "forward_passes": max(passes[ranks, False].calls for ranks in RANKS),
        "forward_passes_checkpointed": max(passes[ranks, True].calls for ranks in RANKS),
        "trained_microbatches": min(made.microbatches for made in passes.values()),
        "microbatches_over_fewest": worst[False]["microbatches_over_fewest"],
    }
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))
