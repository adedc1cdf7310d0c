"""What the models beside the policy are made of, and what of a policy must not be halved."""

from pathlib import Path

import pytest
import torch

from rlzoo.algos import PolicyAlgorithm
from rlzoo.models.policy import load_policy
from tests.strategies.steps import Case, fit, policy_folder

HALF, FULL = torch.bfloat16, torch.float32
KL = (("kl_coef", 0.2),)


def trained(precision: str, folder: Path, tied: bool = False) -> PolicyAlgorithm:
    case = Case("grpo", changes=KL, precision=precision, tied=tied)
    return fit(case, "auto", 1, folder).lightning_module


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "precision, linear, embedding",
    [
        ("32-true", FULL, FULL),
        ("bf16-mixed", HALF, FULL),  # autocast halves linear layers alone
        ("bf16-true", HALF, HALF),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_the_reference_has_the_weights_that_the_policy_computes_with(
    precision, linear, embedding, tied, tmp_path
):
    algo = trained(precision, tmp_path, tied)
    (reference,) = algo.side_models
    assert float(algo.means.compute()["ref_kl"]) == 0  # before the first update: the same policy
    assert reference.base_model.layers[0].mlp.up_proj.weight.dtype == linear
    assert reference.get_input_embeddings().weight.dtype == embedding
    head = reference.get_output_embeddings().weight
    assert head.dtype == (embedding if tied else linear)
    assert tied == (head is reference.get_input_embeddings().weight)


def test_half_weights_keep_the_angles_of_positions(tmp_path):
    expected = dict(load_policy(str(policy_folder(tmp_path, False))).named_buffers())
    algo = trained("bf16-true", tmp_path)
    for model in (algo.policy, *algo.side_models):
        found = dict(model.named_buffers())
        assert found.keys() == expected.keys() and len(found) > 0
        for name, buffer in found.items():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, expected[name])
