"""Every strategy on two gloo ranks makes the very update that one process without one makes."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import make_tiny_model
from tests.forked import Ranks
from tests.strategies.steps import (
    CASES,
    FACTOR,
    STRATEGIES,
    TRIED,
    Case,
    one_step,
    policy_folder,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left the weights after each case under each strategy."""
    folder = tmp_path_factory.mktemp("strategies")
    for tied in (False, True):
        policy_folder(folder, tied)
    variables = os.environ | {"DS_ACCELERATOR": "cpu"}
    ranks = Ranks("tests.strategies.steps", [str(folder)], folder / "said.txt", variables=variables)
    assert ranks.wait(timeout=400) == 0, ranks.communicate()[0][-6000:]
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {case.name: one_step(case, "auto", 1, folder) for case in CASES}


def moved(found: dict[str, Tensor], case: Case) -> Tensor:
    """What the update added to the weights, all in one vector."""
    policy = dict(make_tiny_model(spread=0.1, tied=case.tied).named_parameters())
    return torch.cat([(found[name] - start).flatten() for name, start in policy.items()]).detach()


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy, case", TRIED, ids=lambda it: getattr(it, "name", it))
def test_two_ranks_make_the_update_of_one_process(case, strategy, folder, alone):
    found, expected = torch.load(folder / f"{strategy}.pt")[case.name], alone[case.name]
    assert found["counts"].tolist() == expected["counts"].tolist()
    ours, theirs = moved(found, case), moved(expected, case)
    if case.rights == 0:  # nothing to learn from: skipped, decay and momentum too
        assert not ours.any() and not theirs.any()
        return
    warming_up = "critic_warmup" in dict(case.changes)
    assert bool(theirs.any()) != warming_up
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    for name in (name for name in expected if name.startswith("critic.")):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["grad_norms"], expected["grad_norms"], rtol=1e-5, atol=1e-6)


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_norms_and_weights_are_read_whole_from_shards(strategy, folder, alone):
    for name, found in torch.load(folder / f"{strategy}.pt").items():
        expected = alone[name]
        torch.testing.assert_close(
            found["head_norms"], expected["head_norms"], rtol=1e-4, atol=1e-5
        )
        assert list(found) == list(expected)


def half(folder: Path, strategy: str) -> dict[str, Tensor]:
    return torch.load(folder / f"{strategy}_half.pt")


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("ddp", "zero1")])
def test_microbatches_are_added_up_in_float32_in_half_precision_too(strategy, folder):
    found, expected = (half(folder, name)["grad_norms"][0] for name in (strategy, "ddp"))
    assert float(found / expected) == pytest.approx(1, abs=0.02)


@pytest.mark.deepspeed
def test_zero1_adds_microbatches_up_in_bfloat16_which_it_says(folder):
    lost = 31 * FACTOR / (1 + 31 * FACTOR)
    found, expected = (half(folder, name)["grad_norms"][0] for name in ("zero1", "ddp"))
    assert float(found / expected) == pytest.approx(1 - lost, abs=0.02)


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_reference_says_of_the_same_weights_what_the_policy_says(strategy, folder):
    assert half(folder, strategy)["ref_kl"] < 1e-7  # k3 of a gap of rounding alone, squared


@pytest.mark.deepspeed
def test_objects_travel_over_one_gloo_group_beside_nccl_in_every_life_of_a_process_group(folder):
    for rank in range(2):
        for life, found in enumerate(torch.load(folder / f"talked_{rank}.pt")):
            assert found.pop("heard") == 2 * [[(life, 0), (life, 1)]]
            assert found == {"apart": True, "over": True, "backend": "gloo", "seconds": 77.0}
