"""Rewards while the engine still draws: the same scores as of one call, and nothing left behind."""

import threading
import time

import pytest
import torch

from rlzoo.data.draw import Drawer
from rlzoo.engines.base import Request, Response, Responses, SamplingParams
from rlzoo.errors import UserError
from rlzoo.models.policy import load_tokenizer
from rlzoo.report.ledger import Ledger
from rlzoo.report.progress import Bars
from rlzoo.rewards.base import Scores, Verdict
from rlzoo.rewards.calling import RewardCaller
from rlzoo.rewards.verifier import MathReward
from rlzoo.types import Prompt, Rollouts

TOKENIZER = load_tokenizer("tiny")
PROMPTS = [Prompt(f"p{i}", "?", str(i), token_ids=(3, 4 + i)) for i in range(4)]
BUDGETS = [5, 1, 0, 6]
PATIENCE = 20.0  # seconds for a thread of a busy machine


class Scripted:
    """Tells of its responses backwards, and does something between the first and the rest."""

    dtype = "float32"

    def __init__(self, then=lambda: None) -> None:
        self.then = then

    def generate(self, requests: list[Request], params, version, on_response=None):
        responses = Responses(requests, on_response)
        places = [(i, k) for i, r in enumerate(requests) for k in range(len(r.seeds))]
        for number, (i, k) in enumerate(reversed(places)):
            text = rf"\boxed{{{k if requests[i].token_ids[1] == 4 else 3}}}"
            ids = torch.tensor(TOKENIZER.encode(text, add_special_tokens=False))
            responses.add(i, k, Response(ids, torch.full((len(ids),), -0.5), k == 2, 0))
            if number == 0:
                self.then()
        return responses.groups()


class Noting:
    """Right where prompt and text say so; notes the size and the thread of each call."""

    def __init__(self, by_response: bool) -> None:
        self.by_response, self.calls, self.begun = by_response, [], threading.Event()

    def __call__(self, prompts: list[Prompt], texts: list[str], truncated: list[bool]):
        self.begun.set()
        self.calls.append((len(texts), threading.current_thread() is threading.main_thread()))
        pairs = zip(prompts, texts, truncated, strict=True)
        return [float(rf"{{{p.answer}}}" in text) - 0.5 * cut for p, text, cut in pairs]


def draw(reward, engine: Scripted | None = None, ledger: Ledger | None = None) -> Rollouts:
    drawer = Drawer(
        engine or Scripted(),
        reward,
        TOKENIZER,
        SamplingParams(1.0, 24),
        ledger or Ledger(),
        Bars(enabled=False),
        seed=5,
    )
    return drawer.draw(PROMPTS, BUDGETS, "train", 0)


def rewards_by_hand() -> list[float]:
    firsts = [float(k == 0) - 0.5 * (k == 2) for k in range(5)]
    return [*firsts, 0.0, *(1.0 - 0.5 * (k == 2) for k in range(6))]


@pytest.mark.parametrize("by_response", [False, True])
def test_scores_stand_in_the_order_of_prompts_however_they_were_made(by_response):
    rollouts = draw(Noting(by_response))
    assert rollouts.rewards.tolist() == rewards_by_hand()
    assert rollouts.verdicts.tolist() == [int(r == 1) for r in rewards_by_hand()]
    assert rollouts.group_ids.tolist() == [0] * 5 + [1] + [2] * 6
    assert rollouts.truncated.tolist() == [k == 2 for n in (5, 1, 6) for k in range(n)]


def test_a_reward_by_response_has_the_first_while_the_engine_draws_the_rest():
    reward, came = Noting(by_response=True), []
    draw(reward, Scripted(then=lambda: came.append(reward.begun.wait(PATIENCE))))
    assert came == [True]
    assert sum(size for size, _ in reward.calls) == 12 and len(reward.calls) > 1
    assert not any(in_main for _, in_main in reward.calls)


def test_any_other_reward_is_called_once_with_all_and_in_the_main_thread():
    reward = Noting(by_response=False)
    draw(reward, Scripted(then=lambda: time.sleep(0.05)))
    assert reward.calls == [(12, True)]


def test_what_a_reward_raises_stops_the_engine_and_the_thread():
    drawn = []

    def broken(prompts, texts, truncated):
        return [float("nan")] * len(texts)

    broken.by_response = True

    def wait() -> None:
        deadline = time.monotonic() + PATIENCE
        while any(t.name == "rlzoo-reward" for t in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        drawn.append(1)

    with pytest.raises(UserError, match="broken gave nan to a response to prompt p3"):
        draw(broken, Scripted(then=wait))
    assert drawn == [1]


def test_an_engine_that_fails_leaves_no_thread():
    with pytest.raises(ZeroDivisionError):
        draw(Noting(by_response=True), Scripted(then=lambda: 1 // 0))
    assert not any(thread.name == "rlzoo-reward" for thread in threading.enumerate())


def test_an_engine_that_tells_of_no_response_is_refused():
    engine = Scripted()
    silent = engine.generate
    engine.generate = lambda requests, params, version, told: silent(requests, params, version)
    with pytest.raises(RuntimeError, match="told of 0 responses of 12: its generate"):
        draw(Noting(by_response=True), engine)


def test_only_what_is_waited_for_after_sampling_is_booked_as_verifying():
    def slow(prompts, texts, truncated):
        time.sleep(0.02 * len(texts))
        return [0.0] * len(texts)

    seconds = {}
    for by_response in (False, True):
        slow.by_response, ledger = by_response, Ledger()
        draw(slow, Scripted(then=lambda: time.sleep(0.5)), ledger)
        seconds[by_response] = ledger.phases["verifying/train"]
    assert seconds[False] >= 0.24
    assert seconds[True] <= seconds[False] - 0.015  # one of twelve at least was scored meanwhile


def test_the_verifier_says_of_each_response_what_it_says_of_all_together():
    golds = ["1/2", "3", "t(0,4]", "x+1"]
    prompts = [Prompt(f"p{i}", "?", g, token_ids=(3, 4)) for i, g in enumerate(golds)]
    texts = [rf"\boxed{{{a}}}" for a in ("0.5", "4", "1", "1+x")]
    reward = MathReward(num_workers=1, seconds_per_answer=60.0)
    together = reward(prompts, texts, [False] * 4)
    alone = [reward([p], [text], [False]) for p, text in zip(prompts, texts, strict=True)]
    reward.close()
    assert reward.by_response
    assert together.verdicts.tolist() == [1, 0, int(Verdict.UNVERIFIABLE), 1]
    for name in Scores._fields:
        assert torch.equal(getattr(together, name), torch.cat([getattr(s, name) for s in alone]))


class Ranked(MathReward):
    """Looks at all responses of a draw, so that parts of it would be worth something else."""

    def __call__(self, prompts, texts, truncated):
        return [1.0 / len(texts)] * len(texts)


def test_a_subclass_with_a_call_of_its_own_is_given_all_at_once_unless_it_says_otherwise():
    ranked = Ranked()
    try:
        assert not RewardCaller(ranked).by_response
        assert draw(ranked).rewards.tolist() == pytest.approx([1 / 12] * 12)
    finally:
        ranked.close()
