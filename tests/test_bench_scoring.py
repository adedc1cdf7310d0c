"""`bench scoring`: what its figures are of, and that its two sides do the same work."""

import time

import pytest
import torch

from rlzoo.bench import scoring
from rlzoo.types import Prompt


class FakeWorker:
    """Waits for a tenth of each step, or half of it where the reward is asked at the end."""

    def __init__(self, command, spec, log) -> None:
        self.steps, reward = [], next(o for o in spec["overrides"] if o.startswith("reward."))
        self.share = 0.5 if "AtTheEnd" in reward else 0.1

    def ready(self):
        return {"threads": 1}

    def step(self) -> None:
        time.sleep(0.02)
        first = not self.steps  # which is not timed
        self.steps.append({"seconds": 2.0, "waited": 2.0 if first else 2 * self.share})

    def close(self) -> None:
        pass


def test_shares_are_of_the_timed_steps_of_either_way(monkeypatch):
    monkeypatch.setattr(scoring, "Worker", FakeWorker)
    line = scoring.measure("main", repeats=3)
    assert (line["waiting_share"], line["waiting_share_high"]) == (0.1, 0.1)
    assert line["waiting_share_off"] == 0.5
    assert line["off_over_on_low"] <= line["off_over_on"] <= line["off_over_on_high"]
    assert line["off_over_on"] == pytest.approx(1, abs=0.5)


def test_a_written_solution_follows_from_the_text_alone():
    prompts = [Prompt(str(i), "?", "1") for i in range(6)]
    texts = [f"w{i}" for i in range(6)]
    found = []
    for kind in (scoring.Written, scoring.WrittenAtTheEnd):
        reward = kind(num_workers=1, seconds_per_answer=60.0)
        found.append(reward(prompts, texts, [False] * 6).verdicts)
        alone = [reward([p], [t], [False]).verdicts for p, t in zip(prompts, texts, strict=True)]
        reward.close()
        assert torch.equal(found[-1], torch.cat(alone))
    assert torch.equal(*found) and found[0].eq(1).all()
    assert scoring.Written.by_response and not scoring.WrittenAtTheEnd.by_response
