"""What ranks say to each other, whichever backend their strategy has."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlzoo import distributed


def talk(rank: int, folder: str) -> None:
    """Two process groups, one after the other, that pretend to be nccl's."""
    found = []
    own_backend, dist.get_backend = dist.get_backend, lambda group=None: "nccl"
    for life in range(2):
        dist.get_backend = own_backend
        store = f"file://{folder}/store{life}"
        timeout = timedelta(seconds=77)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
        dist.get_backend = lambda group=None: own_backend(group) if group else "nccl"
        heard = [distributed.all_gather((life, rank, "x" * 10_000 * rank)) for _ in range(2)]
        group = distributed.talking_group()
        seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        found.append(
            {
                "heard": [[item[:2] for item in items] for items in heard],
                "apart": group is not dist.group.WORLD,
                "same": group is distributed.talking_group(),
                "backend": own_backend(group),
                "seconds": seconds,
            }
        )
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def test_objects_travel_over_a_gloo_group_of_their_own_beside_nccl_in_every_life(tmp_path: Path):
    mp.start_processes(talk, (str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        for life, found in enumerate(torch.load(tmp_path / f"{rank}.pt")):
            assert found.pop("heard") == 2 * [[(life, 0), (life, 1)]]
            assert found == {"apart": True, "same": True, "backend": "gloo", "seconds": 77.0}


def test_alone_a_rank_hears_itself_and_needs_no_group():
    assert distributed.all_gather("me") == ["me"]
