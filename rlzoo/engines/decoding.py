"""Next-token logits of growing rows: with a cache, or, where a family has another one, without."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlzoo.engines import attention
from rlzoo.engines.kv_cache import LEAST_SPARE, SlabCache
from rlzoo.models.checks import gap, probe_ids, rlzoo_logprobs
from rlzoo.models.logits import backbone_of, transform_of

log = logging.getLogger(__name__)

REPLACED = ("sdpa", "packed")  # attentions that `rlzoo.engines.attention` computes the same as


class Decoder(Protocol):
    """Rows that grow by tokens."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None: ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Makes a row of each prompt: hidden states [R, D] that predict its next token."""

    def join(self, *parts: tuple[Self, Tensor]) -> None:
        """Becomes rows of these decoders, in order; this one may be the first of them.

        Args:
            parts: decoders, each with the numbers of its rows, of which one may come twice.
        """

    def step(self, tokens: Tensor, going: Tensor) -> Tensor:
        """Adds a token, [R], to each row: hidden states [R, D] that predict the next one.

        Args:
            going: [R] bool; the others have ended, grow no more, and what they give is nothing.
        """


class CachedDecoder:
    """Keeps keys and values of R rows, which all end at one column.

    Args:
        model: with one key-value layer for each of its layers.
        pad_token_id: fills prompts on the left.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self.pad_token_id, self.backbone = pad_token_id, backbone_of(model)
        self.device = next(model.parameters()).device
        self.takes_positions = takes(self.backbone, "position_ids")
        self.in_blocks = model.config._attn_implementation == attention.NAME
        self.cache = SlabCache(model.config.get_text_config().num_hidden_layers)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_token_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = True
        mask = mask.to(self.device)  # [R, S]
        self.lengths = mask.sum(-1)  # [R] tokens of each row; the next one's position
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return self._hidden(ids.to(self.device), mask, positions)

    def join(self, *parts: tuple[CachedDecoder, Tensor]) -> None:
        parts = tuple((decoder, rows) for decoder, rows in parts if len(rows))
        found = [decoder.lengths[rows] for decoder, rows in parts]
        columns = [int(lengths.max()) for lengths in found]
        self.cache.join([(d.cache, rows, n) for (d, rows), n in zip(parts, columns, strict=True)])
        self.lengths = torch.cat(found)
        starts = max(columns) - self.lengths  # [R] first column of each row's tokens
        self.mask = torch.arange(self.cache.capacity, device=self.device) >= starts[:, None]
        self.blocks = attention.blocks_of(starts.tolist(), max(columns))

    def step(self, tokens: Tensor, going: Tensor) -> Tensor:
        if self.cache.length == self.cache.capacity:
            self.join((self, torch.arange(len(tokens), device=self.device)))
        mask = self.mask[:, : self.cache.length + 1]
        blocks = {"row_blocks": self.blocks} if self.in_blocks else {}
        hidden = self._hidden(tokens[:, None], mask, self.lengths[:, None], **blocks)
        self.lengths = self.lengths + going
        return hidden

    def _hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, **further: Any) -> Tensor:
        passed = self.backbone(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **({"position_ids": positions} if self.takes_positions else {}),
            **further,
        )
        hidden: Tensor = passed.last_hidden_state[:, -1]
        return hidden


class RecomputingDecoder:
    """Runs whole rows anew for every token: right for any causal model, and slow.

    Args: see `CachedDecoder`.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self.pad_token_id, self.backbone = pad_token_id, backbone_of(model)
        self.device = next(model.parameters()).device

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.full((len(prompts), max(lengths)), self.pad_token_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        self.ids, self.lengths = ids.to(self.device), torch.tensor(lengths, device=self.device)
        return self._hidden()

    def join(self, *parts: tuple[RecomputingDecoder, Tensor]) -> None:
        parts = tuple((decoder, rows) for decoder, rows in parts if len(rows))
        lengths = torch.cat([decoder.lengths[rows] for decoder, rows in parts])
        width = int(lengths.max())
        self.ids = torch.cat([self._filled(d.ids[rows, :width], width) for d, rows in parts])
        self.lengths = lengths

    def step(self, tokens: Tensor, going: Tensor) -> Tensor:
        width = int(self.lengths.max()) + 1
        if width > self.ids.shape[1]:
            self.ids = self._filled(self.ids, width + LEAST_SPARE)
        self.ids[torch.arange(len(tokens), device=self.device), self.lengths] = tokens
        self.lengths = self.lengths + going
        return self._hidden()

    def _filled(self, ids: Tensor, width: int) -> Tensor:
        return pad(ids, (0, width - ids.shape[1]), value=self.pad_token_id)

    def _hidden(self) -> Tensor:
        ids = self.ids[:, : int(self.lengths.max())]
        passed = self.backbone(input_ids=ids, use_cache=False)
        last = torch.arange(len(ids), device=self.device), self.lengths - 1
        hidden: Tensor = passed.last_hidden_state[last]
        return hidden


def choose_decoder(model: PreTrainedModel, pad_token_id: int) -> type[Decoder]:
    """The fastest that agrees with whole passes on a few tokens: a cache with our own attention,
    one with the model's, none."""
    asked = model.config._attn_implementation
    if asked in REPLACED and model._can_set_attn_implementation():
        model.set_attn_implementation(attention.NAME)
        if cache_agrees(model, pad_token_id):
            return CachedDecoder
        model.set_attn_implementation(asked)
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
    """Whether a prefill of two lengths and steps of rows that repeat, leave and join give the
    log-probs of whole passes."""
    ids = probe_ids(model)
    width = ids.shape[1]
    if width < 4:
        return False
    expected = rlzoo_logprobs(model, ids, "the engine's model")
    starts = [width // 4, width - 2]  # where the two rows' prompts end
    fresh, decoder = CachedDecoder(model, pad_token_id), CachedDecoder(model, pad_token_id)
    try:
        found = [*fresh.prefill([ids[0, :start].tolist() for start in starts])]
        wanted = [start - 1 for start in starts]
        for parts in ([(fresh, [1, 0, 0])], [(decoder, [2, 0]), (fresh, [0])]):
            decoder.join(*((d, torch.tensor(rows, device=ids.device)) for d, rows in parts))
            at = decoder.lengths
            found += [*decoder.step(ids[0, at], torch.ones_like(at, dtype=torch.bool))]
            wanted += at.tolist()
    except Exception as error:
        log.info("A key-value cache does not work for %s: %r", type(model).__name__, error)
        return False
    raw = model.get_output_embeddings()(torch.stack(found)).float()
    return gap(model, transform_of(model)(raw).log_softmax(-1), expected[wanted]) <= 1


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward has an argument of this name, or takes any."""
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
