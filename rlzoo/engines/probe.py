"""The same tokens through the trainer's and the engine's model: stale weights show, wherever.

The tokens are those of training prompts, from where these begin to differ: of tokens at random,
log-probs lie near -20, and half precision moves them several times as far as those of text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rlzoo.diagnosis.causes import Setting, Suspect, size_of
from rlzoo.learning.microbatching import Plan, collate
from rlzoo.models.gather import through
from rlzoo.models.logits import vocabulary_size
from rlzoo.models.logprobs import response_scores
from rlzoo.types import Prompt, Rollouts

SEQUENCES, LENGTH = 8, 16  # of the probe; tokens
PROBE_TOLERANCE = 1e-3  # mean nats a token of the probe where both sides compute in float32
HALF_GAP = 0.1  # nats a token of the probe that half precision on one side alone can explain


def tolerance(setting: Setting, found: Sequence[Suspect] = ()) -> float:
    """Mean |trainer - engine| of the probe that number formats alone can explain, nats."""
    return PROBE_TOLERANCE if setting.exact else max(HALF_GAP, size_of(setting, found))


def probe_sequences(policy: nn.Module, prompts: Sequence[Prompt] = ()) -> list[list[int]]:
    """Tokens of the first prompts; without prompts, tokens spread over the vocabulary.

    The same on every rank. Every matrix takes part in every token's log-prob, but of the input
    embedding only the rows that are named do.
    """
    rendered = [list(prompt.token_ids) for prompt in prompts[:SEQUENCES]]
    shared = os.path.commonprefix(rendered)  # what the template begins every prompt with
    start = max(0, len(shared) - 1) if len(rendered) > 1 else 0
    found = [ids[start : start + LENGTH] for ids in rendered if len(ids) - start >= 2]
    if found:
        return found
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


def as_rollouts(
    sequences: Sequence[Sequence[int]], logprobs: Sequence[Tensor] | None = None
) -> Rollouts:
    """Each sequence as one response to a prompt of its first token.

    Args:
        logprobs: of every token but the first of each, as an engine has them.
    """
    count = len(sequences)
    if logprobs is None:
        logprobs = [torch.zeros(len(s) - 1) for s in sequences]
    return Rollouts(
        prompts=[Prompt(str(i), "", "", token_ids=(s[0],)) for i, s in enumerate(sequences)],
        group_ids=torch.arange(count),
        responses=[torch.tensor(s[1:]) for s in sequences],
        sampler_logprobs=list(logprobs),
        truncated=torch.zeros(count, dtype=torch.bool),
        rewards=torch.zeros(count),
        verdicts=torch.zeros(count, dtype=torch.int8),
        policy_version=-1,
        rollout_step=-1,
    )
