"""What the trainer's own models say of drawn tokens: log-probs, entropies, values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlzoo.learning.microbatching import of_like_length
from rlzoo.ranks.exchange import all_gather, world
from rlzoo.types import NoSuchScore, RolloutBatch, Rollouts, collate

Scores = dict[str, Tensor]  # [B, T] each, by name


def declared(
    names: Sequence[str], own: Mapping[str, Tensor], passed: Callable[[], Scores]
) -> Scores:
    """The scores of a microbatch that an algorithm has declared.

    Args:
        own: what was computed for them beside the policy's pass.
        passed: that pass; made if something is left for it.

    Raises:
        NoSuchScore: nothing computes one of them.
    """
    found = dict(own)
    if not set(names) <= set(found):
        scores = passed()
        found = {**scores, "old_logprobs": scores["logprobs"], **found}
    for name in names:
        if name not in found:
            raise NoSuchScore(
                f"The score {name} is declared, but nothing computes it. At hand:"
                f" {', '.join(found)}; NAME_logprobs of each model in `frozen`; what `score_batch`"
                " returns (docs/extending.md)."
            )
    return {name: found[name] for name in names}


@torch.no_grad()
def score_rollouts(
    rollouts: Rollouts,
    indices: Sequence[int],
    scores_of: Callable[[RolloutBatch], Scores],
    *,
    max_tokens: int,
    pad_token_id: int,
    on_progress: Callable[[int], None] = lambda n: None,
) -> list[int]:
    """Fills `rollouts.scores` for some rollouts; every rank scores its share and holds all.

    Where there is nothing to score, a blank microbatch is, so that its names are there.

    Args:
        indices: the rollouts to score.
        scores_of: the scores of a microbatch, which holds at most `max_tokens` tokens.

    Returns:
        The rollouts that this rank scored.
    """
    rank, world_size = world()
    mine: dict[str, dict[int, Tensor]] = {}
    scored = []
    lists = of_like_length(rollouts, indices, max_tokens, world_size) or [[]] * world_size
    for members in lists[rank::world_size]:
        for name, scores in scores_of(collate(rollouts.rows(members), pad_token_id)).items():
            rows = zip(members, scores.cpu(), strict=False)  # where blank, there is one row more
            mine.setdefault(name, {}).update(
                {i: row[: len(rollouts.responses[i])].clone() for i, row in rows}
            )
        scored += members
        on_progress(len(members))
    nothing = [torch.zeros(0)] * len(rollouts)
    for part in all_gather(mine):
        for name, found in part.items():
            held = rollouts.scores.setdefault(name, list(nothing))
            for i, row in found.items():
                held[i] = row
    return scored
