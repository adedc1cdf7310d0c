import torch

from rlzoo.bench._live import Live
from rlzoo.bench.logprobs import Size, case, memory, plain_scores, seconds, tiled_scores
from rlzoo.models import logprobs


def test_tensors_are_counted_while_they_live():
    before = torch.zeros(1000)
    with Live() as live:
        kept = before + 1  # 4,000 bytes
        view = kept[10:]
        (kept + 1).sum()  # 4,000 and 4 more, freed
        assert live.peak == 8004 and live.largest == 4000
        view.add_(1)
        assert live.now == 4000
        del kept
        assert live.now == 4000  # the view holds it
        del view
        assert live.now == 0


def test_the_bench_compares_the_same_scores_and_finds_the_tiles_smaller(monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", 4096 * 20_000 - 1)  # all logits are more
    given = case(30, Size(16, 700))
    for plain, tiled in zip(plain_scores(*given), tiled_scores(*given), strict=True):
        torch.testing.assert_close(tiled, plain)
    held = memory(4096, Size(64, 20_000))
    assert held["tiled"] < held["plain"] / 8
    took = seconds(300, Size(16, 500), repeats=1)
    assert {len(times) for times in took.values()} == {1}
