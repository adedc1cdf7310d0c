"""The same tokens through the trainer's and the engine's model: stale weights show, wherever."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rlzoo.logprobs import response_scores, vocabulary_size
from rlzoo.microbatching import Plan, collate
from rlzoo.models.gather import through
from rlzoo.types import Prompt, Rollouts

SEQUENCES, LENGTH = 8, 16  # of the probe; tokens
HALF_GAP = 0.3  # nats a token of the probe that half precision on one side alone can explain


def in_half_precision(precision: str, dtype: str) -> bool:
    """Whether trainer (Lightning's `precision`) or engine (`dtype`) computes in less than float32."""
    return precision != "32-true" or dtype != "float32"


def probe_sequences(policy: nn.Module) -> list[list[int]]:
    """Token ids spread over the vocabulary, the same for every policy of its size.

    Every matrix takes part in every token's log-prob, but of the input embedding only the rows
    that are named do.
    """
    size = vocabulary_size(policy.get_output_embeddings())
    draw = np.random.Generator(np.random.Philox(key=0))
    return draw.integers(0, size, (SEQUENCES, LENGTH)).tolist()


@torch.no_grad()
def trainer_scores(
    policy: nn.Module, sequences: Sequence[Sequence[int]], device: torch.device
) -> list[Tensor]:
    """Log-probs, at temperature 1, of every token but the first of each sequence."""
    rollouts = as_rollouts(sequences)
    count = len(sequences)
    batch = collate(rollouts, Plan(list(range(count)), torch.ones(count), 1.0), 0).to(device)
    scores = through(policy, response_scores, policy, batch, 1.0).logprobs.cpu()
    return [row[: len(s) - 1] for row, s in zip(scores, sequences, strict=True)]


def as_rollouts(sequences: Sequence[Sequence[int]]) -> Rollouts:
    """Each sequence as one response to a prompt of its first token."""
    count = len(sequences)
    return Rollouts(
        prompts=[Prompt(str(i), "", "", token_ids=(s[0],)) for i, s in enumerate(sequences)],
        group_ids=torch.arange(count),
        responses=[torch.tensor(s[1:]) for s in sequences],
        sampler_logprobs=[torch.zeros(len(s) - 1) for s in sequences],
        truncated=torch.zeros(count, dtype=torch.bool),
        rewards=torch.zeros(count),
        verdicts=torch.zeros(count, dtype=torch.int8),
        policy_version=-1,
        rollout_step=-1,
    )
