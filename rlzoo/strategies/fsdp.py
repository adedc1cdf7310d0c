"""PyTorch's fully sharded data parallelism (FSDP2) under Lightning, on CUDA and on CPUs."""

from __future__ import annotations

from datetime import timedelta

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rlzoo.values import Positive


class FSDP(ModelParallelStrategy):
    """Every process holds a part of weights, gradients and optimizer states (arXiv:2304.11277).

    Each transformer block is gathered for its own forward and backward pass alone, and so is what
    else a model has.

    Args:
        timeout: seconds that a process waits for the others in one exchange.
    """

    def __init__(self, timeout: Positive = 1800.0) -> None:
        super().__init__(tensor_parallel_size=1, timeout=timedelta(seconds=timeout))

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        module = trainer.lightning_module.to(self.root_device)
        policy = MixedPrecisionPolicy()
        if trainer.precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        elif trainer.precision == "bf16-true":
            module = module.to(torch.bfloat16)
        mesh = self.device_mesh["data_parallel"]
        for model in [*module.children(), *getattr(module, "side_models", ())]:
            shard(model, mesh, policy)
        super().setup(trainer)


def shard(model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shards each transformer block of a model, then the rest of it, in place."""
    if not any(True for _ in model.parameters()):
        return
    names = {  # of what must not be split, as transformers says: the transformer's layers
        name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()
    }
    for part in [*(m for m in model.modules() if type(m).__name__ in names), model]:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
