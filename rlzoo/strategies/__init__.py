from rlzoo.strategies.choice import auto, ddp
from rlzoo.strategies.deepspeed import DeepSpeed
from rlzoo.strategies.fsdp import FSDP

__all__ = ["FSDP", "DeepSpeed", "auto", "ddp"]
