import torch

import rlzoo.models.logprobs
from rlzoo.models.logprobs import response_scores, token_scores
from rlzoo.types import collate
from tests.recorded import recorded_rollouts


def test_scores_are_those_of_a_plain_forward_pass(tiny_model):
    rollouts = recorded_rollouts()
    batch = collate(rollouts.rows([2, 5]), 1)
    scores = response_scores(tiny_model, batch, temperature=0.7)
    for row, index in enumerate((2, 5)):
        prompt = rollouts.prompts[int(rollouts.group_ids[index])].token_ids
        response = rollouts.responses[index]
        ids = torch.tensor([[*prompt, *response.tolist()]])
        logits = tiny_model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1)
        taken = expected.gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(scores.logprobs[row, : len(response)], taken)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(scores.entropy[row, : len(response)], entropy)
        assert not scores.logprobs[row, len(response) :].any()


def test_chunks_change_neither_scores_nor_gradient(monkeypatch):
    head = torch.nn.Linear(8, 40)
    hidden = torch.randn(25, 8, requires_grad=True)
    tokens = torch.randint(40, (25,))
    results = []
    for elements in (2**26, 40 * 7):  # all at once, then 7 tokens at a time
        monkeypatch.setattr(rlzoo.models.logprobs, "CHUNK_ELEMENTS", elements)
        scores = token_scores(hidden, head, tokens, 1.0)
        grads = torch.autograd.grad(scores.logprobs.sum(), [hidden, head.weight])
        results.append([scores.logprobs, scores.entropy, *grads])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_scores_are_float32_whatever_the_policy_is(tiny_model):
    batch = collate(recorded_rollouts().rows([0]), 1)
    scores = response_scores(tiny_model.bfloat16(), batch, 1.0)
    assert scores.logprobs.dtype == torch.float32
