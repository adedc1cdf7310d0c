"""Operations of training, against torch's own count of a forward and a backward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlzoo.models.flops import peak_of, policy_flops
from tests.conftest import VOCABULARY, make_tiny_model

LENGTH = 12


def counted(model) -> int:
    """Of one sequence whose tokens are all scored, by torch; attention is of all pairs."""
    model.config._attn_implementation = "eager"
    ids = torch.randint(VOCABULARY, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def of(model, *lengths: int) -> float | None:
    return policy_flops(model, torch.tensor(lengths), torch.tensor(lengths))


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_that_torch_counts_but_for_half_of_attention(tied):
    model = make_tiny_model(tied=tied)
    config = model.config
    unseen = 6 * config.num_hidden_layers * config.hidden_size * LENGTH**2
    assert of(model, LENGTH) + unseen == counted(model)


def test_frozen_weights_cost_two_thirds_and_sequences_add_up():
    model = make_tiny_model()
    assert of(model, 5, 7) == of(model, 5) + of(model, 7) < of(model, 12)
    whole = of(model, LENGTH)
    attention = 6 * 2 * 32 * LENGTH**2
    model.requires_grad_(False)
    assert of(model, LENGTH) - attention == pytest.approx((whole - attention) * 2 / 3)


def test_a_family_whose_operations_are_not_known_has_none():
    model = make_tiny_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert of(model, LENGTH) is None


@pytest.mark.parametrize(
    "name, peak", [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362)]
)
def test_a_gpus_peak_goes_by_its_name_and_is_that_of_half_precision(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda"), "bf16-mixed") == peak
    assert peak_of(torch.device("cuda"), "32-true") is None
    assert peak_of(torch.device("cpu"), "bf16-mixed") is None
