"""`engine=auto`: vLLM where it can run, transformers otherwise, and says which."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch

from rlzoo.engines.base import Engine, log
from rlzoo.engines.vllm import VLLMEngine


def auto_engine(
    vllm: Callable[..., VLLMEngine],
    transformers: Callable[..., Engine],
    eos_token_ids: Sequence[int],
    pad_token_id: int,
) -> Engine:
    """The fastest engine this machine can run, and this model in it.

    Args:
        vllm, transformers: build either engine; see conf/engine.
        eos_token_ids, pad_token_id: of the tokenizer.
    """
    why_not = why_not_vllm()
    if why_not is None:
        engine = vllm(eos_token_ids=eos_token_ids, pad_token_id=pad_token_id)
        why_not = engine.unsupported()
        if why_not is None:
            log.info("engine=auto takes engine=vllm")
            return engine
    log.info("engine=auto takes engine=transformers (%s)", why_not)
    return transformers(eos_token_ids=eos_token_ids, pad_token_id=pad_token_id)


def why_not_vllm() -> str | None:
    """What this machine lacks for vLLM to be worth its start, or None."""
    missing = {
        "no CUDA device": not torch.cuda.is_available(),
        "vLLM is not installed": importlib.util.find_spec("vllm") is None,
    }
    return ", ".join(reason for reason, lacking in missing.items() if lacking) or None
