"""Every algorithm as its YAML has it, on a tiny random policy and recorded rollouts."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hydra
import torch
from lightning.pytorch.plugins.precision import Precision
from omegaconf import OmegaConf

from rlzoo.algos import PolicyAlgorithm
from rlzoo.launch.configuration import conf_dir
from rlzoo.loop import updates_of
from rlzoo.ranks.exchange import world
from rlzoo.types import RolloutBatch, Rollouts, Update
from tests.conftest import make_tiny_model

OUTSIDE = Path(__file__).parent / "outside" / "conf"
SHARED_FILES = ("shared", "clipped", "sft")  # no policy-gradient algorithm of their own
NAMES = sorted(p.stem for p in (conf_dir() / "algo").glob("*.yaml") if p.stem not in SHARED_FILES)


@functools.cache
def options_of(name: str) -> dict:
    """The numbers of conf/algo/NAME.yaml, or of tests/outside, factories left out."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        overrides = [f"algo={name}", "run_dir=unused", f"hydra.searchpath=[file://{OUTSIDE}]"]
        config = hydra.compose("train", overrides=overrides)
    algo = OmegaConf.to_container(config.algo, resolve=True)
    return {k: v for k, v in algo.items() if k not in ("policy", "optimizer", "scheduler")}


def calm_model() -> torch.nn.Module:
    """Rounding of another batch shape moves its log-probs by 1e-6 at most, not by 2e-5 as where
    weights are spread wider, so that the laws can be held to 1e-5."""
    return make_tiny_model(spread=0.1)


def build(
    name: str,
    policy: Callable[[], torch.nn.Module] = calm_model,
    configure: bool = True,
    **changes: object,
) -> PolicyAlgorithm:
    """The algorithm of conf/algo/NAME.yaml with SGD at lr 1, one update, and these changes.

    Args:
        configure: whether its models are built at once; a Trainer builds them itself.
    """
    options = options_of(name) | {"max_response_tokens": 12, "updates": 1, "passes": 1} | changes
    kind = hydra.utils.get_class(options.pop("_target_"))
    algo = kind(policy=policy, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **options)
    if configure:
        algo.configure_model()
    return algo


def split(algo: PolicyAlgorithm, rollouts: Rollouts, parts: int, world_size: int = 1) -> None:
    """Has each update of a step made in about so many microbatches on each rank."""
    total = sum(rollouts.num_tokens(i) for i in range(len(rollouts)))
    if parts > 1:
        algo.tokens_per_microbatch = max(1, total // (parts * world_size * algo.updates))


def prepared(algo: PolicyAlgorithm, rollouts: Rollouts, parts: int = 1) -> list[RolloutBatch]:
    """This rank's microbatches of a rollout step, always scored by the algorithm's own models."""
    rank, world_size = world()
    algo.trainer = SimpleNamespace(
        world_size=world_size, global_rank=rank, precision_plugin=Precision()
    )
    algo.must_score_old = lambda first: True
    rollouts.scores.clear()
    split(algo, rollouts, parts, world_size)
    return flat(updates_of(rollouts, algo))


def flat(updates: list[Update]) -> list[RolloutBatch]:
    return [batch for update in updates for batch in update.microbatches]


def planned(
    algo: PolicyAlgorithm,
    rollouts: Rollouts,
    parts: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[RolloutBatch]:
    """A rank's microbatches of rollouts that are scored already, or need not be."""
    units, credit = algo.training_units(rollouts), algo.credit(rollouts)
    split(algo, rollouts, parts, world_size)
    return flat(algo.plan_updates(rollouts, units, credit, rank=rank, world_size=world_size))


def gradient(
    algo: PolicyAlgorithm, rollouts: Rollouts, parts: int = 1, drift: float = 0.3
) -> torch.Tensor:
    """This rank's gradient of one optimizer step, all parameters in one vector.

    Args:
        drift: how far old log-probs are moved off the policy, by a smooth function of themselves,
            so that ratios and clips act, alike however the step is split.
    """
    algo.zero_grad()
    for batch in prepared(algo, rollouts, parts):
        if "old_logprobs" in algo.read_scores:
            moved = batch.old_logprobs + drift * torch.sin(7 * batch.old_logprobs)
            batch.old_logprobs = torch.where(batch.response_mask, moved, 0.0)
        algo.training_step(Update([batch]), 0).backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in algo.parameters()]
    )
