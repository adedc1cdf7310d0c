"""What the engine is told of lengths: by prompt, restored by a resume, the longest first."""

import torch

from rlzoo.callbacks.state import Run
from rlzoo.data.draw import Drawer
from rlzoo.engines.base import Request, Response, Responses, SamplingParams, longest_first
from rlzoo.models.policy import load_tokenizer
from rlzoo.report.ledger import Ledger, Limits
from rlzoo.report.progress import Bars
from rlzoo.types import Prompt

PROMPTS = [Prompt(f"p{i}", "?", "1", token_ids=(3, 4 + i)) for i in range(3)]


class Lengthening:
    """Response k of the prompt whose last token is t has t + 10 k tokens."""

    dtype, expected = "float32", ()

    def generate(self, requests: list[Request], params, version, on_response=None):
        self.expected = [request.expected for request in requests]
        responses = Responses(requests, on_response)
        for i, request in enumerate(requests):
            for k in range(len(request.seeds)):
                length = request.token_ids[-1] + 10 * k
                ids = torch.full((length,), 5)
                responses.add(i, k, Response(ids, torch.zeros(length), False, 0))
        return responses.groups()


def make_run() -> tuple[Run, Drawer]:
    ledger, bars = Ledger(), Bars(enabled=False)
    reward = lambda prompts, texts, truncated: [0.0] * len(texts)  # noqa: E731
    params = SamplingParams(1.0, 96)
    drawer = Drawer(Lengthening(), reward, load_tokenizer("tiny"), params, ledger, bars, 0)
    return Run(Limits(), ledger, bars, drawer), drawer


def test_a_request_expects_the_mean_of_its_prompt_else_that_of_the_run():
    _, drawer = make_run()
    drawer.draw(PROMPTS[:2], [2, 1], "pilot", 0)
    assert drawer.engine.expected == [96.0, 96.0]  # nothing is known: the limit
    drawer.draw(PROMPTS, [1, 1, 2], "train", 0)
    assert drawer.engine.expected == [(4 + 14) / 2, 5.0, (4 + 14 + 5) / 3]
    drawer.draw(PROMPTS, [1, 1, 1], "val", 1)
    assert drawer.engine.expected == [(4 + 14 + 4) / 3, 5.0, (6 + 16) / 2]


def test_a_resumed_run_expects_what_it_would_have():
    run, drawer = make_run()
    drawer.draw(PROMPTS, [2, 1, 3], "train", 0)
    resumed, again = make_run()
    resumed.load_state_dict(run.state_dict())
    for each in (drawer, again):
        each.draw(PROMPTS, [1, 1, 1], "train", 1)
    assert again.engine.expected == drawer.engine.expected
    assert len(set(again.engine.expected)) == 3


def test_the_longest_are_drawn_first_and_equals_in_their_order():
    requests = [Request((3,), (1, 2), 5.0), Request((4,), (3,), 9.0), Request((5,), (4,), 5.0)]
    assert longest_first(requests) == [(1, 0), (0, 0), (0, 1), (2, 0)]
