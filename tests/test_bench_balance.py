import json

import pytest
import torch

from rlzoo.bench import balance as bench
from rlzoo.data.shares import Piece
from rlzoo.errors import UserError


def test_waiting_counts_the_slowest_at_every_barrier():
    loads = torch.tensor([[1.0, 3.0], [3.0, 1.0]])  # [ranks, barriers]
    assert bench.waiting(loads) == 1.5
    assert bench.ratio(loads.sum(1)) == 1


def test_a_draw_is_measured_with_every_piece_s_prompt():
    lengths = [torch.tensor([10, 20, 30]).numpy(), torch.tensor([40]).numpy()]
    step = bench.Step([100, 200], [3, 1], lengths, lengths)
    shares = [[Piece(0, 0, 2)], [Piece(0, 2, 3), Piece(1, 0, 1)]]
    expected, actual, read_again = bench.drawn(step, shares, [20.0, 40.0])
    assert actual == pytest.approx(370 / 250)  # 130 and 370 tokens
    assert expected == pytest.approx(360 / 250)  # 140 and 360
    assert read_again == pytest.approx(500 / 400)


@pytest.mark.parametrize("name", bench.DISTRIBUTIONS)
def test_a_step_is_as_the_bench_says(name):
    step = bench.make_step(name, 128, 1024, seed=3)
    assert sum(step.budgets) == 1024 and max(step.budgets) == 150 and min(step.budgets) > 0
    assert [len(group) for group in step.lengths] == step.budgets
    lengths = torch.cat([torch.from_numpy(group) for group in step.lengths])
    assert 1 <= lengths.min() and lengths.max() <= 4096
    assert 0.0 < (lengths == 4096).float().mean() < 0.15 or name == "lognormal"


@pytest.mark.parametrize("prompts, responses", [(128, 1024), (64, 256)])
def test_no_rank_has_a_tenth_more_tokens_than_the_mean_in_small_steps_too(
    prompts, responses, capsys
):
    bench.main(["--prompts", str(prompts), "--responses", str(responses), "--seeds", "2"])
    output = capsys.readouterr().out
    found = json.loads(output.splitlines()[-1])
    assert 1 <= found["slowest_over_mean"] <= found["optimizer_step_slowest_over_mean"] <= 1.1
    assert 1 <= found["sampling_expected_slowest_over_mean"] <= 1.05
    assert found["sampling_slowest_over_mean"] < 2
    for line in (
        "tail             65536        4",
        "lognormal  shipped",
        "tail       whole groups",
    ):
        assert line in output


def test_a_step_smaller_than_its_largest_budget_is_refused():
    with pytest.raises(UserError, match="--responses must be at least 150"):
        bench.main(["--responses", "64"])
