"""`python -m tests.strategies.on_device FOLDER DEVICE`, as a rank that torchrun starts: an update
in bf16-mixed under each strategy, and a large object exchanged; rank 0 leaves what it got there.
"""

import os
import sys
from pathlib import Path

import torch

from rlzoo.ranks.exchange import all_gather
from tests.strategies.steps import STRATEGIES, Case, one_step

TRIED = ("ddp", "fsdp", "zero2", "zero3")
CASE = Case("grpo", changes=(("kl_coef", 0.2),), precision="bf16-mixed")
EXCHANGED = {"cpu": 2**20, "cuda": 2**29}  # bytes of a rank


def main(folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[device]
    found = {
        name: one_step(CASE, STRATEGIES[name](), world_size, folder, accelerator) for name in TRIED
    }
    sizes = [len(item) for item in all_gather(bytes(EXCHANGED[device]))]
    if rank == 0:
        torch.save((found, sizes), folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
