"""Log-probs of response tokens, in chunks so that [tokens, V] never stands in memory whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlzoo.models.gather import through
from rlzoo.models.logits import PLAIN, LogitTransform, backbone_of, transform_of, vocabulary_size
from rlzoo.models.packed import is_packed, packed_hidden
from rlzoo.types import BatchRow, RolloutBatch, collate

CHUNK_ELEMENTS = 2**26  # logits held at once, elements of float32 (256 MiB)


class TokenScores(NamedTuple):
    logprobs: Tensor  # [M] nats, float32; carries gradient if the hidden states do
    entropy: Tensor  # [M] nats, float32, of the tempered distribution


def token_scores(
    hidden: Tensor,
    head: nn.Module,
    tokens: Tensor,
    temperature: float,
    entropy_gradient: bool = False,
    transform: LogitTransform = PLAIN,
) -> TokenScores:
    """Log-prob and entropy at M positions.

    Args:
        hidden: [M, D] last hidden states at the positions that predict the tokens.
        head: the output head, called as a module so that sharding hooks run.
        tokens: [M] int64.
        temperature: logits are divided by it, as they were in sampling.
        entropy_gradient: whether the entropy carries gradient, for an entropy bonus.
        transform: from the head's output to the model's logits.
    """

    def chunk_scores(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = transform(head(h).float()) / temperature  # [m, V]
        log_norm = logits.logsumexp(-1)
        logprobs = logits.gather(-1, t[:, None])[:, 0] - log_norm
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            all_logprobs = logits - log_norm[:, None]
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        return logprobs, entropy

    rows = max(1, CHUNK_ELEMENTS // vocabulary_size(head))
    if len(tokens) <= rows:
        return TokenScores(*chunk_scores(hidden, tokens))
    run = chunk_scores
    if torch.is_grad_enabled():

        def run(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            scored: tuple[Tensor, Tensor] = checkpoint(chunk_scores, h, t, use_reentrant=False)
            return scored

    parts = [run(h, t) for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True)]
    return TokenScores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def response_hidden(policy: PreTrainedModel, batch: RolloutBatch) -> Tensor:
    """[M, D] hidden states that predict the M response tokens of a microbatch, row by row.

    Over real tokens alone where the policy can (`rlzoo.models.packed`). Elsewhere rows are padded
    on the right, so that causal attention keeps padding out of every response.
    """
    rows, offsets = batch.response_mask.nonzero(as_tuple=True)
    places = batch.prompt_lengths[rows] - 1 + offsets
    if is_packed(policy):
        lengths = batch.prompt_lengths + batch.response_mask.sum(-1)
        starts = lengths.cumsum(0) - lengths
        return packed_hidden(policy, batch.input_ids, lengths)[starts[rows] + places]
    passed = backbone_of(policy)(input_ids=batch.input_ids, use_cache=False)
    hidden: Tensor = passed.last_hidden_state
    return hidden[rows, places]


def response_scores(
    policy: PreTrainedModel,
    batch: RolloutBatch,
    temperature: float,
    hidden: Tensor | None = None,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Log-probs and entropies of a microbatch's response tokens, each [B, T]; 0 off the response.

    Args:
        hidden: [M, D] of `response_hidden`, computed here if absent.
    """
    if hidden is None:
        hidden = response_hidden(policy, batch)
    tokens = batch.response_ids[batch.response_mask]
    head = policy.get_output_embeddings()
    scores = token_scores(hidden, head, tokens, temperature, entropy_gradient, transform_of(policy))
    return TokenScores(*(spread(score, batch.response_mask) for score in scores))


@torch.no_grad()
def sequence_logprobs(
    policy: PreTrainedModel, sequences: Sequence[Sequence[int]], device: torch.device
) -> list[Tensor]:
    """Log-probs, at temperature 1, of every token but the first of each sequence."""
    batch = collate([BatchRow(ids[:1], torch.tensor(ids[1:])) for ids in sequences]).to(device)
    scores = through(policy, response_scores, policy, batch, 1.0).logprobs.cpu()
    return [row[: len(ids) - 1] for row, ids in zip(scores, sequences, strict=True)]


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] float32: the [M] values on the mask's True places, in order, and 0 elsewhere."""
    blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return blank.masked_scatter(mask, values)
