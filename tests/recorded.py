"""Made-up rollouts of any shape, and algorithms over a tiny policy, for tests that need no engine."""

import dataclasses
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from rlzoo.algos import GRPO, PolicyAlgorithm
from rlzoo.configuration import conf_dir
from rlzoo.types import Prompt, RolloutBatch, Rollouts
from tests.conftest import make_tiny_model


def recorded_rollouts(
    sizes: tuple[int, ...] = (3, 1, 4), seed: int = 0, vocabulary: int = 40, longest: int = 9
) -> Rollouts:
    """Groups of the given sizes, with 0/1 rewards and lengths from 1 to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, n: torch.randint(2, high, (n,), generator=generator)  # noqa: E731
    total = sum(sizes)
    prompts = [
        Prompt(f"p{i}", "q", "a", token_ids=tuple(draw(vocabulary, 2 + i % 4).tolist()))
        for i in range(len(sizes))
    ]
    lengths = torch.randint(1, longest + 1, (total,), generator=generator).tolist()
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        responses=[draw(vocabulary, n) for n in lengths],
        sampler_logprobs=[torch.full((n,), -1.0) for n in lengths],
        truncated=torch.zeros(total, dtype=torch.bool),
        rewards=torch.randint(0, 2, (total,), generator=generator).float(),
        verdicts=torch.zeros(total, dtype=torch.int8),
        policy_version=0,
        rollout_step=3,
    )


def rewarded(*groups: Sequence[float], lengths: Sequence[int] | None = None) -> Rollouts:
    """Groups with these rewards; rollout i has i + 1 tokens if `lengths` does not say."""
    rollouts = recorded_rollouts(tuple(map(len, groups)))
    draw = torch.Generator().manual_seed(1)
    lengths = lengths or range(1, len(rollouts) + 1)
    return dataclasses.replace(
        rollouts,
        responses=[torch.randint(2, 40, (n,), generator=draw) for n in lengths],
        sampler_logprobs=[torch.full((n,), -1.0) for n in lengths],
        rewards=torch.tensor([float(reward) for group in groups for reward in group]),
    )


def algorithm(kind: type[PolicyAlgorithm] = GRPO, **options: object) -> PolicyAlgorithm:
    """One over the tiny policy, trained by plain gradient descent."""
    defaults = {
        "policy": make_tiny_model,
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0),
        "max_response_tokens": 9,
    }
    made = kind(**defaults | options)
    made.configure_model()
    return made


@cache
def composed(name: str) -> DictConfig:
    """The whole configuration under `algo=name`."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose("train", overrides=[f"algo={name}"])


def configured(name: str, **options: object) -> PolicyAlgorithm:
    """The algorithm of conf/algo/NAME.yaml over the tiny policy, with one update a rollout step."""
    node = composed(name).algo
    settled = ("_target_", "policy", "optimizer", "scheduler", "max_response_tokens")
    numbers = {
        key: OmegaConf.select(composed(name), f"algo.{key}") for key in node if key not in settled
    }
    once = {"updates": 1, "passes": 1, "kl_coef": 0.0}
    return algorithm(get_class(node._target_), **numbers | once | options)


def prepared(
    algo: PolicyAlgorithm,
    rollouts: Rollouts,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[RolloutBatch]:
    """A rank's microbatches of a rollout step, as the trainer would get them."""
    algo.trainer = SimpleNamespace(
        world_size=world_size, global_rank=rank, accumulate_grad_batches=accumulate
    )
    return algo.prepare(rollouts)


def advantages_of(algo: PolicyAlgorithm, rollouts: Rollouts) -> list[float | None]:
    """Each rollout's advantage as its microbatch has it, None if it does not train.

    Rollouts are told apart by their lengths, as `rewarded` makes them.
    """
    found = {}
    for batch in prepared(algo, rollouts):
        rows = zip(batch.response_mask, batch.advantages, strict=True)
        found |= {int(mask.sum()): float(row[0]) for mask, row in rows if mask.any()}
    return [found.get(length) for length in rollouts.lengths.tolist()]


def parameter_gradient(algo: PolicyAlgorithm) -> Tensor:
    """The gradient that stands in the module's parameters, in one vector; 0 where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in algo.parameters()]
    )


def backward(algo: PolicyAlgorithm, batches: Sequence[RolloutBatch]) -> Tensor:
    """The gradient after these microbatches, all of one rank and optimizer step."""
    algo.zero_grad()
    for batch in batches:
        (algo.training_step(batch, 0) / algo.trainer.accumulate_grad_batches).backward()
    return parameter_gradient(algo)
