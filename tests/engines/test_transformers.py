import types

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlzoo.engines import attention, transformers
from rlzoo.engines.base import Request, SamplingParams, weights_checksum
from rlzoo.engines.decoding import CachedDecoder
from rlzoo.engines.drawing import draw, truncated
from rlzoo.engines.kv_cache import SlabCache
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.models.logprobs import response_scores
from rlzoo.types import BatchRow, Prompt, Rollouts, collate
from tests.conftest import make_tiny_model

PARAMS = SamplingParams(temperature=0.9, max_response_tokens=24)
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (3, 4)]


def make_engine(max_rows: int = 64, precision: str = "32-true") -> TransformersEngine:
    engine = TransformersEngine(make_tiny_model, [0], 1, max_rows, precision=precision)
    assert engine.decoder is CachedDecoder  # and not the one that hides what a cache does wrong
    assert engine.model.config._attn_implementation == attention.NAME
    engine.load_weights(make_tiny_model(seed=3).named_parameters(), version=5)
    return engine


def requests(*sizes: int) -> list[Request]:
    return [
        Request(prompt, tuple(100 * i + j for j in range(n)))
        for i, (prompt, n) in enumerate(zip(PROMPTS, sizes, strict=False))
    ]


def test_log_probs_are_the_trainers():
    policy, wanted = make_tiny_model(seed=3), requests(3, 0, 5, 2)
    drawn = make_engine().generate(wanted, PARAMS, expected_version=5)
    assert [len(group) for group in drawn] == [3, 0, 5, 2]
    responses = [r for group in drawn for r in group]
    sizes = torch.tensor([3, 0, 5, 2])
    rollouts = Rollouts(
        prompts=[Prompt(str(i), "", "", token_ids=p) for i, p in enumerate(PROMPTS)],
        group_ids=torch.arange(4).repeat_interleave(sizes),
        responses=[r.token_ids for r in responses],
        sampler_logprobs=[r.logprobs for r in responses],
        truncated=torch.zeros(10, dtype=torch.bool),
        rewards=torch.zeros(10),
        verdicts=torch.zeros(10, dtype=torch.int8),
        policy_version=5,
        rollout_step=0,
    )
    batch = collate(rollouts.rows(), 1)
    scores = response_scores(policy, batch, PARAMS.temperature)
    gap = (scores.logprobs - batch.sampler_logprobs)[batch.response_mask].abs().max()
    assert gap < 1e-5


def test_every_response_is_told_once_as_it_is_returned():
    told = {}
    note = lambda i, k, response: told.update({(i, k): response})  # noqa: E731
    drawn = make_engine(max_rows=3).generate(requests(3, 0, 5, 2), PARAMS, 5, note)
    assert len(told) == 10 and list(told) != sorted(told)  # as they finish
    assert all(told[i, k] is r for i, group in enumerate(drawn) for k, r in enumerate(group))


def test_a_response_is_the_same_alone_and_among_many():
    alone = [make_engine().generate([r], PARAMS, 5)[0] for r in requests(4, 4, 4, 4)]
    together = make_engine().generate(requests(4, 4, 4, 4), PARAMS, 5)
    in_waves = make_engine(max_rows=3).generate(requests(4, 4, 4, 4), PARAMS, 5)
    for groups in zip(alone, together, in_waves, strict=True):
        for one, two, three in zip(*groups, strict=True):
            if one.near_ties == 0:
                assert one.token_ids.tolist() == two.token_ids.tolist() == three.token_ids.tolist()


def test_a_response_ends_with_its_end_token_or_is_truncated():
    responses = [r for g in make_engine().generate(requests(16, 16, 16, 16), PARAMS, 5) for r in g]
    ended = [r for r in responses if not r.truncated]
    cut = [r for r in responses if r.truncated]
    assert ended and cut
    assert all(r.token_ids[-1] == 0 and 0 not in r.token_ids[:-1].tolist() for r in ended)
    assert all(len(r.token_ids) == 24 and 0 not in r.token_ids.tolist() for r in cut)
    assert all(len(r.logprobs) == len(r.token_ids) for r in responses)


def test_different_seeds_give_different_responses():
    group = make_engine().generate(requests(8), PARAMS, 5)[0]
    assert len({tuple(r.token_ids.tolist()) for r in group}) >= 6  # the shortest may coincide


def test_greedy_decoding_takes_the_likeliest_token_every_time():
    policy = make_tiny_model(seed=3)
    (group,) = make_engine().generate(requests(2), SamplingParams(0.0, 6), 5)
    ids = list(PROMPTS[0])
    for token in group[0].token_ids.tolist():
        assert token == int(policy(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert group[0].token_ids.tolist() == group[1].token_ids.tolist()


def test_an_engine_of_another_version_refuses():
    with pytest.raises(RuntimeError, match="version 5, but version 6"):
        make_engine().generate(requests(1), PARAMS, expected_version=6)


def test_after_a_sync_the_checksums_agree_and_before_it_they_do_not():
    engine, policy = make_engine(), make_tiny_model(seed=4)
    assert engine.checksum() != weights_checksum(policy.named_parameters())
    engine.load_weights(policy.named_parameters(), 6)
    assert engine.checksum() == weights_checksum(policy.named_parameters())


def test_a_sync_that_leaves_weights_out_is_refused():
    named = list(make_tiny_model().named_parameters())[:-1]
    with pytest.raises(RuntimeError, match="left out"):
        make_engine().load_weights(named, 6)


def test_inverse_cdf_draws_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    noise = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens, logprobs, _ = draw(logits.expand(10_000, 4), noise, SamplingParams(2.0))
    expected = (logits[0] / 2).softmax(-1)
    torch.testing.assert_close(tokens.bincount() / 10_000, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_a_uniform_at_a_step_of_the_cdf_is_counted_as_a_near_tie():
    logits = torch.zeros(3, 4)
    noise = torch.tensor([0.5 + 5e-6, 0.5 + 5e-5, 1e-9], dtype=torch.float64)
    assert draw(logits, noise, SamplingParams())[2].tolist() == [True, False, False]


@pytest.mark.parametrize(
    "truncation, kept", [({"top_k": 2}, [0, 2]), ({"top_p": 0.6}, [0, 2]), ({"top_p": 0.5}, [0])]
)
def test_truncated_sampling_draws_from_the_likeliest_tokens_and_says_their_log_probs(
    truncation, kept
):
    probs = torch.tensor([0.5, 0.1, 0.3, 0.1])
    noise = torch.linspace(0, 1 - 1e-6, 2000, dtype=torch.float64)
    params = SamplingParams(**truncation)
    tokens, logprobs, _ = draw(probs.log().expand(2000, 4), noise, params)
    assert tokens.unique().tolist() == kept
    for token in kept:
        expected = probs[token] / probs[kept].sum()
        assert (tokens == token).float().mean() == pytest.approx(float(expected), abs=1e-3)
        torch.testing.assert_close(logprobs[tokens == token][0].exp(), expected)


# --- rows that leave and join ---------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, ...]], list[int]]:
    """Prompts that are prefilled, and the rows of each step, in order."""
    prompts, steps = [], []
    prefill, step = CachedDecoder.prefill, CachedDecoder.step
    monkeypatch.setattr(CachedDecoder, "prefill", lambda d, p: prompts.extend(p) or prefill(d, p))
    monkeypatch.setattr(
        CachedDecoder, "step", lambda d, t, g: steps.append(len(t)) or step(d, t, g)
    )
    return prompts, steps


@pytest.mark.parametrize("max_rows", [1, 3, 8, 64])
def test_a_prompt_goes_through_the_model_once_and_rows_are_bounded(max_rows, seen):
    engine, (prompts, steps) = make_engine(max_rows), seen
    prompts.clear(), steps.clear()
    engine.generate(requests(9, 2, 7, 4), PARAMS, 5)
    assert sorted(prompts) == sorted(PROMPTS)
    assert max(steps) <= max_rows


def test_freed_rows_are_filled_while_others_are_drawn(seen):
    engine, steps = make_engine(max_rows=8), seen[1]
    steps.clear()
    drawn = engine.generate(requests(16, 16, 16, 16), PARAMS, 5)
    lengths = [len(r.token_ids) for group in drawn for r in group]
    waves = sum(max(lengths[start : start + 8]) for start in range(0, len(lengths), 8))
    assert len(steps) < 0.8 * waves


def test_the_longest_expected_responses_begin_first():
    told = []
    wanted = [
        r._replace(expected=e) for r, e in zip(requests(2, 2, 2), (1.0, 9.0, 5.0), strict=True)
    ]
    note = lambda i, k, response: told.append(i)  # noqa: E731
    make_engine(max_rows=1).generate(wanted, PARAMS, 5, note)
    assert told == [1, 1, 2, 2, 0, 0]


def test_the_order_of_the_queue_changes_no_response():
    wanted = requests(6, 6, 6, 6)
    turned = [r._replace(expected=float(i)) for i, r in enumerate(wanted)]
    one, other = (make_engine(max_rows=5).generate(w, PARAMS, 5) for w in (wanted, turned))
    for a, b in zip(sum(one, []), sum(other, []), strict=True):
        if a.near_ties == 0:
            assert a.token_ids.tolist() == b.token_ids.tolist()
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


def test_rows_outgrow_their_room_and_prompts_go_in_pieces(monkeypatch):
    """Rows are longer than the room kept at first, and than a block; pieces hold one prompt."""
    params = SamplingParams(0.9, 90)
    engine = make_engine(max_rows=7)
    engine.stop_ids = torch.tensor([5])
    whole = engine.generate(requests(5, 5, 5, 5), params, 5)
    assert max(len(r.token_ids) for group in whole for r in group) > 2 * 32
    monkeypatch.setattr(transformers, "PREFILL_TOKENS", 4)
    monkeypatch.setattr(transformers, "LOGITS", 80)  # two rows
    monkeypatch.setattr(attention, "LEAST_COLUMNS", 4)
    in_pieces = engine.generate(requests(5, 5, 5, 5), params, 5)
    for a, b in zip(sum(whole, []), sum(in_pieces, []), strict=True):
        if a.near_ties == 0:
            assert a.token_ids.tolist() == b.token_ids.tolist()


def test_the_cache_has_room_for_what_is_drawn_not_for_the_limit(monkeypatch):
    capacities = []
    own = SlabCache.join

    def join(cache, parts):
        own(cache, parts)
        capacities.append(cache.capacity)

    monkeypatch.setattr(SlabCache, "join", join)
    engine = make_engine()
    engine.stop_ids = torch.arange(10)
    drawn = engine.generate(requests(9, 9, 9, 9), SamplingParams(0.9, 10_000), 5)
    longest = 6 + max(len(r.token_ids) for group in drawn for r in group)
    assert 6 < max(capacities) <= longest + 32


def test_both_attentions_are_the_same():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(9, n, 1 if n == 6 else 200, 8, generator=draw) for n in (6, 2, 2)
    )
    starts = torch.tensor([0, 3, 40, 41, 100, 150, 150, 199, 10])
    mask = (torch.arange(200) >= starts[:, None])[:, None, None]
    layer = types.SimpleNamespace(num_key_value_groups=3, is_causal=True)
    blocks = attention.blocks_of(starts.tolist(), 200)
    assert [(b.first, b.last, b.start) for b in blocks] == [
        (0, 4, 0),
        (4, 7, 100),
        (7, 8, 199),
        (8, 9, 10),
    ]
    for kwargs in ({}, {"scaling": 0.1}):
        plain = sdpa_attention_forward(layer, query, key, value, mask, **kwargs)[0]
        ours = attention.attention(layer, query, key, value, mask, row_blocks=blocks, **kwargs)[0]
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("size", [40, 512, 1000, 4096])
@pytest.mark.parametrize("params", [SamplingParams(0.7), SamplingParams(top_k=5), SamplingParams()])
def test_a_cdf_by_blocks_draws_what_a_whole_one_does(size, params):
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(400, size, generator=generator)
    noise = torch.rand(400, dtype=torch.float64, generator=generator)
    noise[:4] = torch.tensor([0.0, 1 - 2**-53, 1e-9, 1 - 1e-7], dtype=torch.float64)
    token, logprob, near_tie = draw(logits, noise, params)
    logprobs = truncated(logits / params.temperature, params).log_softmax(-1)
    cdf = logprobs.double().exp().cumsum(-1)
    target = (noise * cdf[:, -1])[:, None]
    plain = torch.searchsorted(cdf, target, right=True)
    clear = ~near_tie
    assert clear.sum() > 300
    assert torch.equal(token[clear], plain[clear, 0])
    drawn = logprobs.gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob, drawn, rtol=0, atol=2e-6)
    assert drawn.isfinite().all()  # nothing that top-k leaves out, at either end of the noise
    plain = plain.clamp(max=size - 1)
    after = cdf.gather(1, plain) - target
    before = target - cdf.gather(1, plain) + logprobs.gather(1, plain).exp()
    wide = (torch.minimum(after, before) > 2e-5)[:, 0]
    assert not near_tie[wide].any()


@pytest.mark.parametrize("precision, dtype", [("bf16-mixed", "bfloat16"), ("32-true", "float32")])
def test_the_copy_computes_in_the_trainers_precision(precision, dtype):
    engine, policy = make_engine(precision=precision), make_tiny_model(seed=3)
    assert engine.dtype == dtype
    assert {str(p.dtype) for p in engine.model.parameters()} == {f"torch.{dtype}"}
    named = list(policy.named_parameters())
    assert engine.checksum() == weights_checksum(named, getattr(torch, dtype))
    (group,) = engine.generate(requests(6)[:1], PARAMS, 5)
    assert all(r.logprobs.dtype == torch.float32 for r in group)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        batch = collate([BatchRow(PROMPTS[0], r.token_ids) for r in group])
        scores = response_scores(policy, batch, PARAMS.temperature).logprobs
    gaps = torch.cat(
        [(s[: len(r.token_ids)] - r.logprobs).abs() for s, r in zip(scores, group, strict=True)]
    )
    assert gaps.mean() < (0.05 if dtype == "bfloat16" else 1e-5)


def learned_positions() -> GPT2LMHeadModel:
    """With as many as the longest prompt and response have tokens."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=1, **sizes))


def stretched_positions() -> Phi3ForCausalLM:
    """Whose frequencies are others beyond 64 tokens, for all rows of a pass."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        initializer_range=0.12,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8,
            "long_factor": [8.0] * 8,
        },
    )
    return Phi3ForCausalLM(config)


@pytest.mark.parametrize("make", [learned_positions, stretched_positions])
def test_rows_that_have_ended_take_no_place_beyond_the_limit(make):
    """They stay in the batch for a while, beside rows that were begun later."""
    engine = TransformersEngine(lambda: make().eval(), [1], 0, max_rows=16, device="cpu")
    engine.version = 0
    prompt = tuple(range(2, 34))
    wanted = [Request(prompt, tuple(range(8 * i, 8 * i + 8))) for i in range(16)]
    drawn = engine.generate(wanted, SamplingParams(1.0, 32), 0)
    responses = [response for group in drawn for response in group]
    assert max(len(response.token_ids) for response in responses) == 32
    ids = [[*prompt, *response.token_ids.tolist()] for response in responses]
    for one, response in zip(ids, responses, strict=True):
        (scored,) = engine.score([one])
        torch.testing.assert_close(scored[31:], response.logprobs, rtol=1e-4, atol=1e-4)
