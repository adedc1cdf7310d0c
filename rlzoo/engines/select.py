"""`engine=auto`: vLLM where it can run, transformers otherwise, and says which."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from rlzoo.engines.base import Engine, log
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.types import PolicyFactory

ENGINES = {"transformers": TransformersEngine}  # the vLLM engine registers here when it exists


def auto_engine(
    policy: PolicyFactory, eos_token_ids: Sequence[int], pad_token_id: int, max_rows: int = 512
) -> Engine:
    """The fastest engine this machine can run; arguments as in TransformersEngine."""
    missing = [
        reason
        for reason, is_missing in (
            ("no CUDA device", not torch.cuda.is_available()),
            ("vLLM is not installed", importlib.util.find_spec("vllm") is None),
            ("this rlzoo has no vLLM engine yet", "vllm" not in ENGINES),
        )
        if is_missing
    ]
    name = "transformers" if missing else "vllm"
    why = f" ({', '.join(missing)})" if missing else ""
    log.info("engine=auto takes engine=%s%s", name, why)
    return ENGINES[name](policy, eos_token_ids, pad_token_id, max_rows)
