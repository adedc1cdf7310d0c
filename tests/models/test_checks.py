"""The policy that is scored and trained is the model's own forward, or its family is refused."""

import re
from pathlib import Path

import pytest
import torch

import rlzoo.models.logits
from rlzoo.bench._tiny_models import families, tiny_config
from rlzoo.bench.architectures import examined
from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.decoding import CachedDecoder, RecomputingDecoder
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.errors import UserError
from rlzoo.models.checks import check_policy, probe_ids
from rlzoo.models.gradnorms import head_gradient_norms
from rlzoo.models.limits import longest_sequence
from rlzoo.models.logits import LogitTransform, transform_of
from rlzoo.models.policy import load_policy
from rlzoo.models.tiles import TILE_ELEMENTS
from tests.conftest import make_tiny_model
from tests.models.families import saved

FAMILIES = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gemma3_text", "phi", "phi3"),
    *("mistral", "olmo2", "smollm3", "granite", "cohere", "gpt2", "gpt_neox", "opt", "bloom"),
    *("gpt_oss", "lfm2"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_scored_drawn_trained_exported_and_resumed_as_its_own_forward_has_it(
    family, tmp_path
):
    row = examined(family, tmp_path)
    assert (row.outcome, row.note) == ("works", "")
    assert row.gap <= 1e-4


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, expected",
    [
        ("gemma2", LogitTransform(1.0, 5.0)),
        ("recurrent_gemma", LogitTransform(1.0, 5.0)),
        ("cohere", LogitTransform(0.25)),
        ("granite", LogitTransform(0.25)),
        ("falcon_h1", LogitTransform(0.25)),
        ("hyperclovax", LogitTransform(4.0)),
        ("llama", LogitTransform()),
    ],
)
def test_what_a_configuration_says_of_logits(family, expected):
    keys = {"final_logit_softcapping": 5.0, "logits_soft_cap": 5.0, "logit_scale": 0.25}
    keys |= {"logits_scaling": 4.0, "lm_head_multiplier": 0.25}
    own = {k: v for k, v in keys.items() if hasattr(tiny_config(family), k)}

    class Policy(torch.nn.Module):
        config = tiny_config(family, **own)

    assert transform_of(Policy()) == expected


@pytest.mark.parametrize("family, key", [("gemma2", "CAPS"), ("cohere", "FACTORS")])
def test_logits_that_rlzoo_does_not_know_are_refused_by_name(family, key, tmp_path, monkeypatch):
    monkeypatch.setattr(rlzoo.models.logits, key, ())
    folder = saved(tmp_path, family)
    with pytest.raises(UserError) as refused:
        load_policy(str(folder))
    said = {"gemma2": "final_logit_softcapping=30", "cohere": "logit_scale="}[family]
    assert str(folder) in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("family", ["bert", "xlnet", "inkling_text"])
def test_a_family_that_cannot_be_trained_is_refused_by_name(family, tmp_path):
    with pytest.raises(UserError, match="ForCausalLM|LMHeadModel"):
        load_policy(str(saved(tmp_path, family)))


def test_a_masked_language_model_is_told_that_it_looks_ahead():
    policy = make_tiny_model()
    for layer in policy.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="tokens that come later"):
        check_policy(policy, "model.path=here")


@pytest.mark.parametrize("num_tokens", [5, 40])  # Gram form, and the matrix itself
@pytest.mark.parametrize("chunk", [2**25, 300])  # elements: the vocabulary whole, and in pieces
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)])
def test_gradient_norms_follow_the_chain_rule_in_chunks(num_tokens, chunk, transform, monkeypatch):
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", chunk)
    draw = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 16, generator=draw)
    weight = torch.randn(50, 16, generator=draw, requires_grad=True)
    bias, tokens = torch.randn(50, generator=draw), torch.randint(50, (num_tokens,), generator=draw)
    logprobs = (transform(hidden @ weight.T + bias) / 0.7).log_softmax(-1)
    logprobs[torch.arange(num_tokens), tokens].sum().backward()
    (norm,) = head_gradient_norms([hidden], weight.detach(), [tokens], 0.7, bias, transform)
    assert norm.item() == pytest.approx(weight.grad.norm().item(), rel=1e-5)


class NormedHead(torch.nn.Linear):
    """A head whose output is not its input times its weight."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, torch.nn.functional.normalize(self.weight))


def test_a_head_that_is_no_linear_layer_is_refused():
    """Log-probs, their gradients and gradient norms are taken from its weight."""
    policy = make_tiny_model(spread=0.1)
    policy.lm_head = NormedHead(*reversed(policy.lm_head.weight.shape), bias=False)
    with pytest.raises(UserError, match="in a way that rlzoo does not know"):
        check_policy(policy, "model.path=here")


# --- positions ------------------------------------------------------------------------------------

LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.5, 2.0]}


@pytest.mark.parametrize(
    "kind, settings, expected",
    [
        ("default", {}, 40),
        ("linear", {"factor": 4.0}, 160),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 20}, 80),
        ("dynamic", {"factor": 4.0}, 40),
        ("longrope", LONGROPE | {"original_max_position_embeddings": 20}, 20),
    ],
)
def test_a_sequence_ends_where_positions_do_or_begin_to_vary(kind, settings, expected):
    rope = {"rope_type": kind, "rope_theta": 10000.0} | settings
    config = tiny_config("llama", max_position_embeddings=40, rope_parameters=rope)
    assert longest_sequence(config) == expected


def test_up_to_there_what_is_drawn_is_what_is_scored(tmp_path):
    """Beyond, a longer sequence gives its early tokens other frequencies."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = str(saved(tmp_path, "llama", max_position_embeddings=32, rope_parameters=rope))
    policy = load_policy(folder)
    engine = TransformersEngine(lambda: load_policy(folder), [64], 1)
    engine.version = 0
    gaps = {}
    for length in (longest_sequence(policy.config), 60):
        request = Request((5, 6, 7), tuple(range(4)))
        ((*drawn,),) = engine.generate([request], SamplingParams(1.0, length - 3), 0)
        ids = torch.stack([torch.tensor([5, 6, 7, *r.token_ids.tolist()]) for r in drawn])
        own = policy(ids, use_cache=False).logits.detach().log_softmax(-1)[:, 2:-1]
        own = own.gather(2, ids[:, 3:, None])[..., 0]
        gaps[length] = float((own - torch.stack([r.logprobs for r in drawn])).abs().max())
    assert gaps[32] < 1e-5 < 1e-2 < gaps[60]


# --- noise ----------------------------------------------------------------------------------------

NOISY = {
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.9},
    "falcon": {"attention_dropout": 0.3, "hidden_dropout": 0.3},  # read from the configuration
    "bloom": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "phi": {"attention_dropout": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "gpt_neo": {"attention_dropout": 0.3, "resid_dropout": 0.3, "embed_dropout": 0.3},
    "mixtral": {"router_jitter_noise": 0.3, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("family", NOISY)
def test_noise_of_a_models_configuration_is_off_and_stays_in_what_is_exported(family, tmp_path):
    folder = saved(tmp_path, family, **NOISY[family])
    attention = "eager" if family in ("bloom", "gpt_neo") else "sdpa"
    policy = load_policy(str(folder), attention=attention, gradient_checkpointing=True)
    ids = probe_ids(policy)
    own = policy.eval()(ids, use_cache=False).logits
    for _ in range(3):
        trained = policy.train()(ids, use_cache=False).logits
        torch.testing.assert_close(trained, own, rtol=0, atol=1e-5)
    assert {key: getattr(policy.config, key) for key in NOISY[family]} == NOISY[family]


def test_noise_that_cannot_be_switched_off_is_refused(monkeypatch):
    policy = make_tiny_model()
    policy.model.norm.register_forward_hook(
        lambda module, args, out: out + module.training * torch.randn_like(out)
    )
    with pytest.raises(UserError, match="between training and evaluation"):
        check_policy(policy, "model.path=here")


def test_log_probs_that_are_not_finite_are_refused_with_the_dtype():
    policy = make_tiny_model(spread=300.0).half()
    with pytest.raises(UserError, match="model.dtype=float16.*bfloat16"):
        check_policy(policy, "model.path=here")


# --- the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, decoder", [("lfm2", RecomputingDecoder), ("mistral", CachedDecoder)]
)
def test_an_engine_takes_a_cache_only_where_it_is_right(family, decoder, tmp_path, caplog):
    folder = str(saved(tmp_path, family))
    engine = TransformersEngine(lambda: load_policy(folder), [0], 1)
    assert engine.decoder is decoder
    assert ("without a key-value cache" in caplog.text) == (decoder is RecomputingDecoder)


def test_both_decoders_draw_the_same_tokens():
    drawn = []
    for decoder in (CachedDecoder, RecomputingDecoder):
        engine = TransformersEngine(make_tiny_model, [0], 1)
        engine.decoder, engine.version = decoder, 0
        requests = [Request((5, 6, 7), tuple(range(9))), Request((8,), (20, 21))]
        drawn += [engine.generate(requests, SamplingParams(0.9, 12), 0)]
    for one, other in zip(*map(lambda groups: [r for g in groups for r in g], drawn), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


def test_the_documented_table_has_every_family_of_this_transformers():
    table = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    results = dict(re.findall(r"^\| (\S+) \| \S* *\| (\w+)", table, re.MULTILINE))
    results.pop("family")
    assert sorted(results) == sorted(families())
    assert {results[family] for family in FAMILIES} == {"works"}
    assert set(results.values()) == {"works", "refused", "none"}
