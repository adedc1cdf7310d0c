"""What a `vllm serve` process needs to take weights from a trainer: methods for its workers.

Named by `--worker-extension-cls rlzoo.engines.vllm_worker.SyncWorker`; called through the server's
`/collective_rpc`, which passes strings, numbers, lists and dicts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from rlzoo.engines.vllm import repack_tied_head


class SyncWorker:
    """Mixed into vLLM's worker class."""

    reload_weights: Callable[..., None]  # these three are the worker's
    get_model: Callable[[], nn.Module]
    model_config: Any
    rlzoo_version = -1  # policy version of the weights held; -1 before the first load

    def rlzoo_load(self, path: str, version: int) -> dict[str, Any]:
        """Reloads the weights from a safetensors file that both processes see."""
        self.reload_weights(weights_iterator=tensors(path))
        repack_tied_head(self.get_model())
        self.rlzoo_version = version
        return self.rlzoo_describe()

    def rlzoo_describe(self) -> dict[str, Any]:
        """What the client compares before it trusts this server."""
        config, text = self.model_config, self.model_config.hf_text_config
        return {
            "version": self.rlzoo_version,
            "architectures": list(config.hf_config.architectures or []),
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
            "max_model_len": config.max_model_len,
            "logprobs_mode": str(config.logprobs_mode),
            "dtype": str(config.dtype).removeprefix("torch."),
        }


def tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)
