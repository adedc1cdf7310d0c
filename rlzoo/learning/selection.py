"""Which rollouts train: masks and pairs over a rollout step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rlzoo.learning.advantages import DEGENERATE, group_stats
from rlzoo.rewards.base import is_right
from rlzoo.types import Rollouts

log = logging.getLogger(__name__)


Selection = Tensor | Sequence[Sequence[int]]  # [N] bool, or lists of indices that train together


def units_of(selection: Selection, truncated: Tensor | None = None) -> list[list[int]]:
    """The rollouts that were selected, those that train together in one list.

    Args:
        truncated: [N] bool, rollouts that are left out, and what trains together with them.
    """
    if isinstance(selection, Tensor):
        units = [[i] for i in selection.nonzero()[:, 0].tolist()]
    else:
        units = [list(unit) for unit in selection]
    if truncated is None:
        return units
    return [unit for unit in units if not truncated[unit].any()]


def with_the_rest(units: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The units and every other of `count` rollouts, each for itself, in their order."""
    held = {i for unit in units for i in unit}
    return sorted([*map(list, units), *([i] for i in range(count) if i not in held)])


def said_if_single(rollouts: Rollouts, name: str) -> bool:
    """Whether there are groups too small to teach, which is then said of the algorithm of that
    name; the column `single_groups` counts them."""
    single = int((rollouts.group_ids.bincount() == 1).sum()) if len(rollouts) else 0
    if single:
        log.warning(
            f"{single} of {len(rollouts.prompts)} prompts have one response in this rollout step:"
            f" {name}, which compares responses, learns nothing of them (column single_groups;"
            " sampler.allocator.n_min=2 gives every prompt two)."
        )
    return single > 0


def correct(rewards: Tensor) -> Tensor:
    """[N] bool: the right rollouts (`rlzoo.rewards.base.is_right`)."""
    return is_right(rewards)


def solved_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups in which every one is correct."""
    return is_right(group_stats(rewards, group_ids).low)


def unsolved_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups in which none is correct."""
    return ~is_right(group_stats(rewards, group_ids).high)


def mixed_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: rollouts of groups that hold right and wrong ones (Reinforce-Rej, DAPO).

    A group of one is never mixed and goes; released code keeps it (docs/formulas.md 7.2).
    """
    stats = group_stats(rewards, group_ids)
    return is_right(stats.high) & ~is_right(stats.low)


def best_and_worst(
    rewards: Tensor, group_ids: Tensor, *, chosen_must_be_correct: bool = True
) -> list[tuple[int, int]]:
    """(chosen, rejected) of every group that has a pair: its best and its worst rollout.

    Among equals the one drawn first is taken; responses of a prompt are exchangeable.

    Args:
        rewards: [N] in [0, 1].
        group_ids: [N] int64.
        chosen_must_be_correct: False also pairs a wrong rollout with a worse one, as reference
            code does (docs/formulas.md 7.3).
    """
    values: list[float] = rewards.tolist()
    members: dict[int, list[int]] = {}
    for i, group in enumerate(group_ids.tolist()):
        members.setdefault(group, []).append(i)
    pairs = []
    for mine in members.values():
        best, worst = max(mine, key=values.__getitem__), min(mine, key=values.__getitem__)
        degenerate = values[best] - values[worst] <= DEGENERATE
        if not degenerate and (is_right(values[best]) or not chosen_must_be_correct):
            pairs.append((best, worst))
    return pairs


def trained_lengths(rollouts: Rollouts, all_train: bool) -> tuple[Tensor, Tensor]:
    """Tokens of each rollout that trains, prompt and response, and of its response alone.

    Args:
        all_train: whether those that were not selected stay.
    """
    prompts = torch.tensor([len(prompt.token_ids) for prompt in rollouts.prompts])
    responses = rollouts.lengths
    lengths = prompts[rollouts.group_ids] + responses
    if all_train or rollouts.selected is None:
        return lengths, responses
    return lengths[rollouts.selected], responses[rollouts.selected]
