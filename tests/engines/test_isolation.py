"""What starts inside a trainer's process leaves it as it was, and does not silence it."""

import subprocess
import sys

import pytest
import torch

from rlzoo.engines.isolation import isolated

SPEAKS = """
import os, sys, threading
from pathlib import Path
from rlzoo.callbacks.rank_watch import say
from rlzoo.engines.isolation import isolated
say("before")
with isolated(Path(sys.argv[1]), keep="NOTHING"):
    os.write(2, b"a banner")
    with isolated(Path(sys.argv[1] + "2"), keep="NOTHING"):
        watch = threading.Thread(target=say, args=("rank 1 is gone.",))
        watch.start()
        watch.join()
    say("still")
say("after")
"""


def test_the_rank_watch_speaks_to_the_terminal_while_an_engine_starts(tmp_path):
    log = tmp_path / "vllm.log"
    done = subprocess.run(
        [sys.executable, "-c", SPEAKS, str(log)], capture_output=True, text=True, check=True
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("rlzoo: ")]
    assert told == [f"rlzoo: {word}" for word in ("before", "rank 1 is gone.", "still", "after")]
    assert log.read_text() == "a banner" and "banner" not in done.stderr


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
