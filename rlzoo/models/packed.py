"""Passes over real tokens alone: rows stand one after another, and attention keeps them apart.

A family takes part if transformers' flash attention could do it, which is told where rows begin as
we tell it and sees no mask, and if it then has the log-probs of padded rows (`settle_attention`).
The others are padded.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlzoo.errors import UserError, one_line
from rlzoo.models.checks import check_policy, gap, probe_ids, rlzoo_logprobs
from rlzoo.models.logits import backbone_of, transform_of

log = logging.getLogger(__name__)

AUTO = "auto"  # packed where the family allows it, transformers' choice where not
PACKED = "packed"  # its name as transformers' attn_implementation
HARMLESS = {  # what families hand to any attention, and this one needs not look at
    *("position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions"),
    *("cu_seq_lens_k", "max_length_k", "is_causal", "output_hidden_states", "return_dict"),
}


class Unpackable(ValueError):
    """A family asks of attention what `packed_attention` does not do."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row; a pass that is not packed is sdpa's.

    Args:
        query, key, value: [1, heads, tokens, width of a head], key and value of fewer heads or as
            many.
        cu_seq_lens_q: [B + 1] int32, where each row begins, and the end.
        max_length_q: tokens of the longest row.

    Returns:
        [1, tokens, heads, width of a head].

    Raises:
        Unpackable: a bias or another setting of attention that it does not know.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    window = others.pop("sliding_window", None) or 0
    strange = [name for name, x in others.items() if x is not None and name not in HARMLESS]
    if strange:
        raise Unpackable(f"attention with {', '.join(strange)}")
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and value.dtype in (torch.bfloat16, torch.float16) and not dropout:
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        attended = varlen_attn(
            *(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),
            scale=scaling,
            window_size=(window - 1, 0),
            enable_gqa=grouped,
        )
        assert isinstance(attended, Tensor)
        return attended[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    parts = [
        scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=near(q, window),
            dropout_p=dropout,
            is_causal=not 0 < window < q.shape[2],
            scale=scaling,
            enable_gqa=grouped,
        )
        for q, k, v in rows
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def near(query: Tensor, window: int) -> Tensor | None:
    """[tokens, tokens] bool, the `window` tokens up to each; None where that is all before it."""
    tokens = query.shape[2]
    if not 0 < window < tokens:
        return None
    return query.new_ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - window)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def is_packed(policy: PreTrainedModel) -> bool:
    config = getattr(policy, "config", None)  # a plain module has none
    return getattr(config, "_attn_implementation", None) == PACKED


def packed_hidden(policy: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """[tokens, D] last hidden states of the rows' own tokens, row after row.

    Args:
        input_ids: [B, S], padded on the right.
        lengths: [B] tokens of each row, at least 1.
    """
    real = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
    starts = pad(lengths.cumsum(0), (1, 0))
    places = torch.arange(int(starts[-1]), device=lengths.device)
    passed = backbone_of(policy)(
        input_ids=input_ids[real][None],
        position_ids=(places - starts[:-1].repeat_interleave(lengths))[None],
        # Of four dimensions, so that no mask is made; no attention looks at it.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=lengths.device),
        use_cache=False,
        cu_seq_lens_q=starts.int(),
        cu_seq_lens_k=starts.int(),
        max_length_q=int(lengths.max()),
        max_length_k=int(lengths.max()),
    )
    hidden: Tensor = passed.last_hidden_state[0]
    return hidden


# --- which families ------------------------------------------------------------------------------


def loaded_with(attention: str) -> str | None:
    """transformers' attn_implementation that a model is loaded with; None leaves it the choice,
    sdpa where the family has it. `settle_attention` follows."""
    return {AUTO: None, PACKED: "sdpa"}.get(attention, attention)


def check_placed(policy: PreTrainedModel) -> None:
    """`check_policy`, and what follows, of a policy that could not run where it was loaded;
    collective."""
    source, attention = vars(policy).pop("unchecked", (None, ""))
    if source is not None:
        check_policy(policy, source)
        settle_attention(policy, attention, source)


def settle_attention(policy: PreTrainedModel, attention: str, source: str) -> None:
    """Packs a model's rows from now on, if asked to and able. Collective where ZeRO-3 holds it.

    Raises:
        UserError: `model.attention=packed` of a family that cannot.
    """
    if attention not in (AUTO, PACKED):
        return
    reason = why_not(policy)
    if reason is None:
        return
    if attention == PACKED:
        raise UserError(
            f"{source}: rows of {type(policy).__name__} cannot be packed (model.attention=packed):"
            f" {reason}. Take model.attention=auto, which pads the rows of such a family."
        )
    log.info("Rows of %s are padded: %s.", type(policy).__name__, reason)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """`set_attn_implementation`, in the copies of the configuration too that a model's parts hold
    (`rlzoo.models.noise`)."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and config._attn_implementation == before:
            config._attn_implementation = name


@torch.no_grad()
def why_not(policy: PreTrainedModel) -> str | None:
    """Why a model's rows cannot be packed; None once they are."""
    flash = getattr(policy, "_supports_flash_attn", False)
    if not (flash and getattr(policy, "_supports_attention_backend", False)):
        return "transformers has no flash attention for it"
    before = policy.config._attn_implementation
    ids = probe_ids(policy)
    lengths = torch.tensor([ids.shape[1], ids.shape[1] // 2, 1], device=ids.device)
    rows = torch.cat([ids, ids.flip(1), ids])
    pairs = zip(rows, lengths, strict=True)
    padded = [rlzoo_logprobs(policy, row[None], "")[:n] for row, n in pairs]
    try:
        set_attention(policy, PACKED)
        hidden = packed_hidden(policy, rows, lengths)
        logits = transform_of(policy)(policy.get_output_embeddings()(hidden).float())
    except Exception as error:  # a family's code may raise anything
        set_attention(policy, before)
        return f"{type(error).__name__}: {one_line(error)[:200]}"
    if not gap(policy, logits.log_softmax(-1), torch.cat(padded)) <= 1:
        set_attention(policy, before)
        return "its log-probs are then others, so that rows see each other"
    return None
