"""The mismatch doctor names what sets engine and trainer apart, from the gaps alone."""

import pytest
import torch

from rlzoo.diagnosis.causes import Evidence, Probe, gap_figures, verdict
from rlzoo.diagnosis.probe import HALF_GAP
from rlzoo.engines.base import weights_checksum


def gaps(inner: float, first: float | None = None, last: float | None = None) -> list[torch.Tensor]:
    """Of five rollouts of six tokens."""
    row = torch.full((6,), inner)
    row[0], row[-1] = first or inner, last or inner
    return [row.clone() for _ in range(5)]


@pytest.mark.parametrize(
    ("found", "probe_gap", "limit", "cause"),
    [
        (gaps(1e-6), 1e-6, 0.01, "rounding"),
        (gaps(1e-4, last=2.0), 1e-6, 0.01, "how a response ends"),
        (gaps(1e-4, first=2.0), 1e-6, 0.01, "the prompt"),
        (gaps(0.5), 0.6, 0.01, "the weights"),
        (gaps(0.5), 0.6, HALF_GAP, "the weights"),
        (gaps(0.5), 1e-4, 0.01, "the sampling settings"),
        (gaps(0.004), 0.05, HALF_GAP, "precision"),  # bfloat16 against float32
        (gaps(0.004), 0.002, 0.01, "precision"),
        (gaps(0.5), None, 0.01, "a weight sync that failed"),
    ],
)
def test_each_pattern_of_gaps_has_its_cause(found, probe_gap, limit, cause):
    probe = None if probe_gap is None else Probe(probe_gap, limit)
    assert cause in Evidence(None, probe).cause(found, (), 1.0)


def test_the_verdict_has_the_figures_and_a_mend_only_where_something_is_wrong():
    figures = gap_figures(torch.tensor([0.0, 0.0, 0.0, 0.4]))
    assert figures["logprob_gap/mean"] == pytest.approx(0.1)
    assert figures["logprob_gap/far"] == 0.25
    assert "tis_cap" in verdict(figures, "a cause", 1.0) and "a cause" in verdict(
        figures, "a cause", 1.0
    )
    assert verdict(gap_figures(torch.zeros(4)), "a cause", 1.0).startswith(
        "Engine and trainer agree"
    )
    assert gap_figures(torch.zeros(0)) == {}


def test_checksums_compare_weights_of_two_number_formats_and_see_one_wrong_bit():
    coarse = [("b", torch.randn(3, 5).bfloat16()), ("a", torch.randn(7).bfloat16())]
    fine = [(name, tensor.float()) for name, tensor in reversed(coarse)]
    assert weights_checksum(coarse) != weights_checksum(fine)
    assert weights_checksum(coarse, torch.float32) == weights_checksum(fine)
    fine[0][1][3] += 1e-6
    assert weights_checksum(coarse, torch.float32) != weights_checksum(fine)
    assert weights_checksum(coarse) == weights_checksum(fine, torch.bfloat16)
