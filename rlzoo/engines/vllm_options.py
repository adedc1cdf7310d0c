"""What `engine.options` and `engine.tensor_parallel` may be, told before vLLM starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlzoo.errors import UserError

OWN_KEYS = {  # arguments of vllm.LLM that have a key of their own
    "model": "model.path",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "engine.dtype",
    "max_model_len": "datamodule.max_prompt_tokens and max_response_tokens",
    "max_num_seqs": "engine.max_num_seqs",
    "tensor_parallel_size": "engine.tensor_parallel",
    "enforce_eager": "engine.enforce_eager",
    "kv_cache_dtype": "engine.kv_cache_dtype",
    "enable_chunked_prefill": "engine.chunked_prefill",
    "gpu_memory_utilization": "engine.gpu_memory_share",
    "enable_sleep_mode": "engine.sleep_level",
    "kv_cache_memory_bytes": "engine.kv_cache_gb",
    "seed": "seed",
}
OURS = (  # what rlzoo relies on
    *("skip_tokenizer_init", "generation_config", "load_format", "enable_prefix_caching"),
    *("logprobs_mode", "disable_log_stats", "distributed_executor_backend"),
)
OTHER_POLICY = (  # the policy that draws would not be the one that is trained, or was never tried
    *("quantization", "quantization_config", "hf_overrides", "speculative_config", "enable_lora"),
    *("lora_modules", "tokenizer", "tokenizer_mode", "revision", "config_format", "hf_config_path"),
    *("pipeline_parallel_size", "data_parallel_size", "cpu_offload_gb", "rope_scaling"),
    "rope_theta",
    *("max_logprobs", "worker_cls", "worker_extension_cls", "override_generation_config"),
)


def check_options(options: Mapping[str, Any]) -> None:
    """Whether `engine.options` leaves alone what rlzoo sets, and the policy what it is.

    Raises:
        UserError: it does not; names the key to take instead, if there is one.
    """
    for name in options:
        name = str(name)
        plain = name.replace("-", "_")
        if plain in OWN_KEYS:
            raise UserError(f"engine.options.{name}: rlzoo sets it; take {OWN_KEYS[plain]}.")
        if plain in OURS:
            raise UserError(
                f"engine.options.{name}: rlzoo sets it, and would not work with another value."
                " Leave it out."
            )
        if plain in OTHER_POLICY:
            raise UserError(
                f"engine.options.{name}: with it vLLM may draw from another policy than the one"
                " that is trained, or was never tried with weights that change. Leave it out."
            )


def check_heads(heads: int | None, size: int) -> None:
    """Raises a UserError if an engine of `size` processes cannot share out a model's heads."""
    if heads is not None and heads % size:
        raise UserError(
            f"engine.tensor_parallel={size} must divide the {heads} attention heads of the model,"
            " which vLLM shares out over the processes of an engine. Take one of"
            f" {divisors(heads)}."
        )


def check_joined(size: int, processes: int, of: str) -> None:
    """Raises a UserError if engines of `size` processes each do not share all processes out."""
    if processes % size:
        raise UserError(
            f"engine.tensor_parallel={size} joins consecutive processes to one engine, and must"
            f" divide the {processes} {of}. Take one of {divisors(processes)}."
        )


def divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
