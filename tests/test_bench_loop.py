"""The bench that times rlzoo and TRL: what it says of the figures of both."""

import pytest
import torch

from rlzoo.bench import loop
from rlzoo.bench._random_policies import make_policy, make_tokenizer
from rlzoo.bench._slots import slots_counted


def side(seconds: list[float], **counts: float) -> dict:
    steps = [{"seconds": s, "seconds/sampling": s / 2, **counts} for s in seconds]
    return loop.summary(seconds, steps)


def test_a_case_says_what_the_sides_did_not_do_alike():
    found = {
        "rlzoo": side([1.0, 3.0, 2.0], tokens=10, updates=4, **{"slots/update": 20}),
        "trl_plain": side([4.0, 4.0, 4.0], tokens=12, updates=4, **{"slots/update": 30}),
    }
    assert found["rlzoo"]["seconds"] == 2.0
    assert found["rlzoo"]["shares"] == {
        **{"sampling": 0.5, "reward": 0.0, "scoring": 0.0},
        "update": 0.5,
    }
    differs = loop.differences(found, "trl_plain")
    assert differs == {"tokens": [10, 12], "slots/update": [20, 30]}


def test_the_last_line_has_the_headlines_and_every_case():
    line = {"trl_over_rlzoo": 3.0, "trl_over_rlzoo_low": 2.0, "trl_over_rlzoo_high": 4.0}
    found = loop.headline([{"case": "tiny_float32", **line}, {"case": "25m_bf16", **line}])
    assert found["trl_over_rlzoo_skewed"] == 3.0
    assert found["trl_over_rlzoo_25m_bf16_high"] == 4.0
    assert "trl_over_rlzoo_equal" not in found  # nothing was measured for it


@torch.no_grad()
@pytest.mark.parametrize("mean_length, expected", [(None, 0.0), (8.0, 1 / 8)])
def test_a_random_policy_ends_its_responses_when_asked_to(mean_length, expected):
    model = make_policy("1m", mean_length, seed=1)
    ids = torch.randint(4, 2000, (16, 24), generator=torch.Generator().manual_seed(0))
    ends = model(input_ids=ids).logits.softmax(-1)[..., 0]
    assert ends.mean() == pytest.approx(expected, rel=0.05, abs=1e-4)


def test_a_question_has_a_token_a_byte():
    tokenizer = make_tokenizer(2000)
    turns = [{"role": "user", "content": "abc"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert len(ids) == 2 + 3
    assert tokenizer.decode([300, 0], skip_special_tokens=True) == "w300"


def test_passes_and_slots_are_counted_by_phase():
    model, ids = make_policy("1m"), torch.full((3, 5), 7)
    with slots_counted(lambda: "here") as counts:
        model(input_ids=ids)
        model(input_ids=ids[:1])
    model(input_ids=ids)
    assert counts == {"passes/here": 2, "slots/here": 20}
