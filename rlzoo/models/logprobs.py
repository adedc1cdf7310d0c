"""Log-probs of response tokens, in tiles so that [tokens, V] never stands in memory whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rlzoo.models.gather import as_forward, through
from rlzoo.models.logits import PLAIN, LogitTransform, backbone_of, transform_of
from rlzoo.models.packed import is_packed, packed_hidden
from rlzoo.models.tiles import (
    KEPT_ELEMENTS,
    Head,
    Places,
    add_product,
    full_precision,
    hidden_gradient,
    logit_gradient,
    softmax_of,
    square_blocks,
)
from rlzoo.types import BatchRow, RolloutBatch, collate


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
    """Log-prob and entropy at M positions: a float32 softmax of logits as precision rounds them.

    Args:
        hidden: [M, D] last hidden states at the positions that predict the tokens.
        head: the output head, a linear layer; called as a module so that sharding hooks run.
        tokens: [M] int64.
        temperature: logits are divided by it, as they were in sampling.
        entropy_gradient: whether the entropy carries gradient, for an entropy bonus.
        transform: from the head's output to the model's logits.
    """

    def scored(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        own = Head.of(head, temperature, transform)
        found: tuple[Tensor, Tensor] = Scored.apply(  # type: ignore[no-untyped-call]
            hidden, own.weight, own.bias, tokens, own[2:], entropy_gradient
        )
        return found

    return TokenScores(*as_forward(head, scored, hidden, tokens))


class Scored(torch.autograd.Function):
    """Log-prob and entropy of each token, [M] float32.

    The backward walk makes each tile of logits again, four matrix products where whole logits take
    three, unless all of them are `KEPT_ELEMENTS` at most, which the forward walk keeps. Under a
    frozen head (LoRA) the gradient of each log-prob by its hidden state is known
    without the loss, and comes out of the forward walk: two products, as with whole logits. Sums of
    gradients are float32, those of the head rounded once to its weight's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        settings: tuple[torch.dtype, float, LogitTransform],
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, *settings)
        by_hidden, by_weight, by_bias = ctx.needs_input_grad[:3]
        ctx.known = by_hidden and not (by_weight or by_bias or entropy_gradient)
        small = len(tokens) * len(weight) <= KEPT_ELEMENTS
        ctx.tiles = [] if small and by_hidden and not ctx.known else None
        with full_precision(hidden):
            if ctx.known:
                found, gradient = hidden_gradient(hidden.to(head.dtype), head, tokens)
            else:
                found = softmax_of(hidden.to(head.dtype), head, tokens, kept=ctx.tiles)
        log_norm, entropy = found.log_norm, found.entropy
        if ctx.known:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(hidden, weight, bias, tokens, log_norm, entropy)
        ctx.settings, ctx.entropy_gradient = settings, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return found.own - log_norm, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known:
            (gradient,) = ctx.saved_tensors
            return of_logprobs[:, None] * gradient, None, None, None, None, None
        hidden, weight, bias, tokens, log_norm, entropy = ctx.saved_tensors
        head, blocks = Head(weight, bias, *ctx.settings), square_blocks(tokens)
        states = hidden.to(head.dtype)
        tiles, ctx.tiles = iter(ctx.tiles or ()), None  # overwritten below; another walk makes them
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with full_precision(hidden):
            for columns, part in head.parts(blocks):
                weight_sum = torch.zeros_like(part.weight, dtype=torch.float32)
                for rows in blocks:
                    kept, places = next(tiles, None), Places.of(tokens[rows], columns)
                    logits = part.logits(states[rows]) if kept is None else kept
                    given = [log_norm[rows], of_logprobs[rows]]
                    if ctx.entropy_gradient:
                        given += [of_entropy[rows], entropy[rows]]
                    gradient = logit_gradient(part, logits, places, *given)
                    if of_bias is not None:
                        of_bias[columns] += gradient.sum(0)
                    gradient = gradient.to(head.dtype)
                    add_product(of_hidden[rows], gradient, part.weight)
                    if of_weight is not None:
                        add_product(weight_sum, gradient.T, states[rows])
                if of_weight is not None:
                    of_weight[columns] = weight_sum
        return of_hidden, of_weight, of_bias, None, None, None


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
