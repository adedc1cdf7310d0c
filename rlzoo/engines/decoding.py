"""Next-token logits of growing rows: with a cache, or, where a family has another one, without."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlzoo.engines.kv_cache import SlabCache
from rlzoo.models.checks import gap, probe_ids, rlzoo_logprobs
from rlzoo.models.logits import backbone_of, transform_of

log = logging.getLogger(__name__)


class CachedDecoder:
    """Keeps keys and values of R rows, prompts padded on the left.

    Args:
        model: with one key-value layer for each of its layers.
        pad_token_id: fills prompts.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        self.backbone = backbone_of(model)
        self.device = next(model.parameters()).device
        self.takes_positions = takes(self.backbone, "position_ids")

    def prefill(self, prompts: Sequence[Sequence[int]], spare: int) -> Tensor:
        """Runs each prompt once: logits [R, V] of its next token.

        Args:
            spare: tokens that rows may grow by.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_token_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.mask = mask.to(self.device)  # [R, S]
        self.cache = SlabCache(self.model.config.get_text_config().num_hidden_layers, spare)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.position = self.mask.sum(-1)  # [R] of the next token
        return self._logits(ids.to(self.device), positions)

    def take_rows(self, rows: Tensor) -> None:
        """Keeps the rows named, in that order; a row may be named more than once."""
        self.cache.take_rows(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Adds a token, [R], to each row: logits [R, V] of the next one."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        logits = self._logits(tokens[:, None], self.position[:, None])
        self.position = self.position + 1
        return logits

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **({"position_ids": positions} if self.takes_positions else {}),
        ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[:, -1]).float()
        return transform_of(self.model)(logits)


class RecomputingDecoder:
    """Runs whole rows anew for every token: right for any causal model, and slow.

    Args: see `CachedDecoder`.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        self.backbone = backbone_of(model)
        self.device = next(model.parameters()).device

    def prefill(self, prompts: Sequence[Sequence[int]], spare: int) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.full((len(prompts), max(lengths) + spare), self.pad_token_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        self.ids, self.lengths = ids.to(self.device), torch.tensor(lengths, device=self.device)
        return self._logits()

    def take_rows(self, rows: Tensor) -> None:
        self.ids, self.lengths = self.ids[rows], self.lengths[rows]

    def step(self, tokens: Tensor) -> Tensor:
        self.ids[torch.arange(len(tokens), device=self.device), self.lengths] = tokens
        self.lengths = self.lengths + 1
        return self._logits()

    def _logits(self) -> Tensor:
        ids = self.ids[:, : int(self.lengths.max())]
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=self.device), self.lengths - 1]
        return transform_of(self.model)(self.model.get_output_embeddings()(last).float())


Decoder = CachedDecoder | RecomputingDecoder


def choose_decoder(model: PreTrainedModel, pad_token_id: int) -> type[Decoder]:
    """The one with a cache, if that agrees with whole passes on a few tokens."""
    if cache_agrees(model, pad_token_id):
        return CachedDecoder
    log.warning(
        "engine=transformers decodes %s without a key-value cache, since its layers keep other"
        " states: every token costs a whole pass. engine=vllm is faster, where it has this family.",
        type(model).__name__,
    )
    return RecomputingDecoder


@torch.no_grad()
def cache_agrees(model: PreTrainedModel, pad_token_id: int) -> bool:
    """Whether a prefill of two lengths and steps of repeated and dropped rows give the log-probs
    of whole passes."""
    ids = probe_ids(model)
    width = ids.shape[1]
    if width < 4:
        return False
    expected = rlzoo_logprobs(model, ids, "the engine's model")
    starts = [width // 4, width - 2]  # where the two rows' prompts end
    decoder = CachedDecoder(model, pad_token_id)
    try:
        logits = decoder.prefill([ids[0, :start].tolist() for start in starts], width)
        rows = torch.tensor([1, 0, 0], device=ids.device)
        decoder.take_rows(rows)
        found, wanted = [*logits], [start - 1 for start in starts]
        at = torch.tensor(starts, device=ids.device)[rows]
        for kept in ([0, 1, 2], [0, 2]):
            rows = torch.tensor(kept, device=ids.device)
            decoder.take_rows(rows)
            at = at[rows]
            found += [*decoder.step(ids[0, at])]
            wanted += at.tolist()
            at = at + 1
    except Exception as error:
        log.info("A key-value cache does not work for %s: %r", type(model).__name__, error)
        return False
    return gap(model, torch.stack(found).log_softmax(-1), expected[wanted]) <= 1


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward has an argument of this name, or takes any."""
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
