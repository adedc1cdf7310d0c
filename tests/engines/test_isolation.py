"""What starts inside a trainer's process leaves it as it was, and does not silence it."""

import os
import sys
import threading

import pytest
import torch

from rlzoo.callbacks.rank_watch import say
from rlzoo.engines.isolation import isolated, torch_threads


def test_the_rank_watch_speaks_to_the_terminal_while_an_engine_starts(tmp_path, capfd, monkeypatch):
    log = tmp_path / "vllm.log"
    monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))  # a process's own, not pytest's
    say("before")
    with isolated(log, keep="NOTHING"):
        os.write(2, b"a banner")
        with isolated(tmp_path / "inner.log", keep="NOTHING"):
            watch = threading.Thread(target=say, args=("rank 1 is gone.",))
            watch.start()
            watch.join()
        say("still")
    say("after")
    told = capfd.readouterr().err.splitlines()
    assert told == [f"rlzoo: {word}" for word in ("before", "rank 1 is gone.", "still", "after")]
    assert log.read_text() == "a banner"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_of_matrix_products_is_put_back(precision, tmp_path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with isolated(tmp_path / "log", keep="NOTHING"):
            torch.set_float32_matmul_precision("highest")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_torch_has_other_threads_only_while_it_is_asked_to():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise KeyError
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before
