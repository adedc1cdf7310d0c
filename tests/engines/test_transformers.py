import pytest
import torch

from rlzoo.engines.base import Request, SamplingParams, weights_checksum
from rlzoo.engines.decoding import CachedDecoder
from rlzoo.engines.drawing import draw
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.models.logprobs import response_scores
from rlzoo.types import Prompt, Rollouts, collate
from tests.conftest import make_tiny_model

PARAMS = SamplingParams(temperature=0.9, max_response_tokens=24)
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (3, 4)]


def make_engine(max_rows: int = 64) -> TransformersEngine:
    engine = TransformersEngine(
        make_tiny_model, eos_token_ids=[0], pad_token_id=1, max_rows=max_rows
    )
    assert engine.decoder is CachedDecoder  # and not the one that hides what a cache does wrong
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
