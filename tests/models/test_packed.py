"""Rows one after another, in the place of padded ones: the same log-probs and gradients."""

import logging

import pytest
import torch

from rlzoo.errors import UserError
from rlzoo.models.logprobs import response_scores
from rlzoo.models.packed import is_packed, packed_attention
from rlzoo.models.policy import load_policy
from rlzoo.types import BatchRow, collate
from tests.conftest import make_tiny_model
from tests.models.families import saved

LENGTHS = ((3, 9), (1, 1), (14, 2), (5, 30), (2, 17))  # of prompts and responses


def batch():
    chance = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 40, (sum(pair),), generator=chance) for pair in LENGTHS]
    rows = [
        BatchRow(x[:prompt].tolist(), x[prompt:])
        for x, (prompt, _) in zip(ids, LENGTHS, strict=True)
    ]
    return collate(rows)


def scores_and_gradient(model, checkpointing=False):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = response_scores(model, batch(), 0.7)
    (found.logprobs * batch().response_mask).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return found.logprobs.detach(), gradient


def assert_packs(packed, padded, **options):
    assert is_packed(packed) and not is_packed(padded)
    (ours, mine), (theirs, other) = (scores_and_gradient(x, **options) for x in (packed, padded))
    assert theirs.abs().max() > 1 and other.norm() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (mine - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_have_the_log_probs_and_gradients_of_padded_ones(checkpointing):
    models = (make_tiny_model(attention=kind) for kind in ("packed", "sdpa"))
    assert_packs(*models, checkpointing=checkpointing)


WINDOW = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("qwen2", WINDOW),
        ("gemma3_text", {"sliding_window": 6}),
        ("llama", {"attention_dropout": 0.1}),  # which the parts have in a copy, as 0
        ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1}),
    ],
)
def test_families_are_packed_if_they_can_be(tmp_path, family, changes):
    """With windows of six tokens too, which the longest rows reach beyond."""
    folder = str(saved(tmp_path, family, **changes))
    assert_packs(load_policy(folder), load_policy(folder, attention="sdpa"))


@pytest.mark.parametrize(
    "family, reason",
    [
        ("mpt", "transformers has no flash attention for it"),
        ("gemma2", "Unpackable: attention with softcap"),
        ("lfm2", "rows see each other"),
    ],
)
def test_other_families_are_padded_and_told_of(tmp_path, family, reason, caplog):
    folder = str(saved(tmp_path, family))
    with caplog.at_level(logging.INFO):
        assert not is_packed(load_policy(folder))
    assert reason in caplog.text
    if family != "mpt":  # which has no sdpa either
        with pytest.raises(UserError, match="model.attention=packed.*Take model.attention=auto"):
            load_policy(folder, attention="packed")


def test_a_backbone_sees_real_tokens_alone():
    model, seen = make_tiny_model(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    response_scores(model, batch(), 1.0)
    assert seen == [(1, sum(map(sum, LENGTHS)), 32)]


def test_a_setting_of_attention_that_is_not_known_is_refused():
    q = torch.zeros(1, 2, 3, 4)
    starts = torch.tensor([0, 1, 3], dtype=torch.int32)
    for strange in ({"softcap": 30.0}, {"s_aux": q}):
        with pytest.raises(ValueError, match="attention with"):
            packed_attention(None, q, q, q, None, cu_seq_lens_q=starts, max_length_q=2, **strange)
