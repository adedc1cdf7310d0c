"""A policy sharded by FSDP over two gloo ranks reaches the engines whole, tensor by tensor."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlzoo.engines.base import weights_checksum
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.models.gather import gathered
from tests import forked
from tests.conftest import make_tiny_model


def sync_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    policy = make_tiny_model(seed=3)
    mesh = init_device_mesh("cpu", (2,))
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    held = sum(parameter.to_local().numel() for parameter in policy.parameters())
    engine = TransformersEngine(make_tiny_model, [0], 1, device="cpu")
    engine.load_weights(gathered(policy.named_parameters()), 1)
    torch.save((held, engine.checksum()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_each_rank_holds_half_and_its_engine_gets_all(tmp_path: Path):
    forked.on_ranks(sync_on_a_rank, (str(tmp_path),), 2)
    whole = make_tiny_model(seed=3)
    size = sum(parameter.numel() for parameter in whole.parameters())
    for rank in range(2):
        held, checksum = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert 0.45 * size < held < 0.55 * size
        assert checksum == weights_checksum(whole.named_parameters())
