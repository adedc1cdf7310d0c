import json

from rlzoo.bench import update


def test_an_update_computes_real_tokens_alone_once_or_twice_with_gradient_checkpointing(
    capsys, monkeypatch
):
    monkeypatch.setattr(update, "LIMIT", 400)  # tokens of the longest response
    monkeypatch.setattr(update, "MEDIAN", 90)
    monkeypatch.setattr(update, "BUDGET", 1200)
    update.main(["--responses", "256", "--trained", "96", "--seeds", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1 <= found["slots_over_tokens"] <= 1.01  # a rank that has nothing runs two blank tokens
    assert found["trained_microbatches"] > 1
    assert found["forward_passes"] == 1
    assert found["forward_passes_checkpointed"] == 2
    assert found["padded_slots_over_tokens"] > found["slots_over_tokens"]
