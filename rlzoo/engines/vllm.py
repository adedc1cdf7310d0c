"""`engine=vllm`: a vLLM engine inside each training process, fed new weights in memory.

One response is one vLLM request with its own seed, so that its noise follows its prompt and index;
the prompt of a group is prefilled once, through prefix caching. vLLM is imported when the engine
starts, at the first weight sync: by then Lightning has set up its processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlzoo.engines.base import (
    OnResponse,
    Request,
    Response,
    Responses,
    SamplingParams,
    check_version,
    log,
    longest_first,
)
from rlzoo.engines.isolation import isolated, torch_threads
from rlzoo.engines.shapes import checked_weights, expected_shapes
from rlzoo.engines.vllm_options import check_heads, check_joined, check_options
from rlzoo.errors import UserError
from rlzoo.models.limits import TokenLimits, check_length, longest_sequence
from rlzoo.models.loading import load_config, model_directory
from rlzoo.ranks.exchange import all_gather, world
from rlzoo.values import AtLeast1, PathText, Positive, ShareAbove0, Text

GIB = 2**30
AUTO_SHARE = 0.4  # of a GPU, where no forecast has said more; enough for 1.5B beside its trainer
NOT_INSTALLED = (
    "engine=vllm needs vLLM, which is not installed. Install rlzoo[vllm] on a machine with CUDA,"
    " requirements/cpu.txt (make venv) on one without, or take engine=transformers."
)


class VLLMBase:
    """What vLLM's engines, in this process and behind servers, hold of the model they draw from.

    Args:
        path: model directory or hub name; only its configuration is read.
        eos_token_ids: any of them ends a response.
        pad_token_id: taken for the protocol's sake; vLLM pads nothing.
        max_prompt_tokens, max_response_tokens: their sum is the longest sequence.
        trust_remote_code: runs code that a hub model brings along.
        log_file: where vLLM's banners and warnings go.

    Raises:
        UserError: a model too short for the longest sequence.
    """

    def __init__(
        self,
        path: PathText,
        eos_token_ids: Sequence[int],
        pad_token_id: int = 0,
        *,
        max_prompt_tokens: AtLeast1,
        max_response_tokens: AtLeast1,
        trust_remote_code: bool = False,
        log_file: PathText = "vllm.log",
    ) -> None:
        self.path = model_directory(path)
        self.config = load_config(path, trust_remote_code)
        limits = TokenLimits(path, None, longest_sequence(self.config))
        check_length(limits, max_prompt_tokens, max_response_tokens)
        self.max_model_len = max_prompt_tokens + max_response_tokens
        self.eos_token_ids, self.log_file = sorted(eos_token_ids), Path(log_file)
        self.trust_remote_code = trust_remote_code
        self.shapes = expected_shapes(self.config, trust_remote_code)
        self.version, self.asleep = -1, False

    def sampling(self, params: SamplingParams) -> dict[str, Any]:
        """What vLLM is asked for, by its names."""
        named = params._asdict()
        named["max_tokens"] = named.pop("max_response_tokens")
        return named | {"stop_token_ids": self.eos_token_ids, "logprobs": 0}

    def checksum(self) -> None:
        """vLLM packs its weights for its kernels, so that they cannot be read back: None."""


class VLLMEngine(VLLMBase):
    """Draws responses with vLLM in the trainer's own process.

    Args:
        dtype: "auto" is float32 on a CPU and bfloat16 on a GPU.
        kv_cache_gb: GiB of key-value cache; null on CUDA fills `gpu_memory_share`.
        gpu_memory_share: of the GPU, for weights and cache together, in (0, 1]. CUDA alone. "auto"
            is AUTO_SHARE here; the launch puts what its forecast of memory leaves in its place.
        max_num_seqs: responses decoded at once; None is 512 on a GPU and 256 on a CPU.
        tensor_parallel: GPUs that hold one engine together, consecutive ranks of one node.
        sleep_level: what is given back while the policy trains: 0 nothing, 1 the cache (weights
            wait in host memory), 2 the cache and the weights. CUDA alone.
        enforce_eager: true runs without CUDA graphs; a CPU always does.
        kv_cache_dtype: "auto" is that of the weights.
        chunked_prefill: splits long prompts over decoding steps. CUDA alone.
        processes: of the trainer on each machine, which tensor_parallel must divide; None: unknown.
        options: further arguments of vllm.LLM, by name; see `check_options`.
        model, shared: see `VLLMBase`.

    Raises:
        UserError: processes or heads that tensor_parallel does not divide, or options that rlzoo
            sets.
    """

    def __init__(
        self,
        *model: Any,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        kv_cache_gb: Positive | None = None,
        gpu_memory_share: ShareAbove0 | Literal["auto"] = "auto",
        max_num_seqs: AtLeast1 | None = None,
        tensor_parallel: AtLeast1 = 1,
        sleep_level: Literal[0, 1, 2] = 2,
        enforce_eager: bool = False,
        kv_cache_dtype: Text = "auto",
        chunked_prefill: bool = True,
        processes: AtLeast1 | None = None,
        options: dict[str, Any] | None = None,
        **shared: Any,
    ) -> None:
        if processes is not None:
            check_joined(tensor_parallel, processes, "processes of each machine (trainer.devices)")
        check_options(options or {})
        super().__init__(*model, **shared)
        text = self.config.get_text_config()
        check_heads(getattr(text, "num_attention_heads", None), tensor_parallel)
        self.cuda = torch.cuda.is_available()
        self.dtype: str = dtype if dtype != "auto" else "bfloat16" if self.cuda else "float32"
        self.kv_cache_gb, self.tensor_parallel = kv_cache_gb, tensor_parallel
        self.gpu_memory_share = AUTO_SHARE if gpu_memory_share == "auto" else gpu_memory_share
        self.max_num_seqs = max_num_seqs or (512 if self.cuda else 256)
        self.sleep_level = sleep_level if self.cuda else 0
        self.enforce_eager = enforce_eager or not self.cuda
        # On a CPU, vLLM 0.32.0 raises where a request with a seed is prefilled in pieces.
        self.kv_cache_dtype, self.chunked_prefill = kv_cache_dtype, chunked_prefill and self.cuda
        self.options = dict(options or {})
        self.architectures = self.config.architectures or []
        self._llm: Any = None  # vllm.LLM, once started
        self._shares_ranks = False  # whether it uses the trainer's process group
        self._threads: int | None = None  # of torch, which vLLM serves with; CUDA

    # --- life -------------------------------------------------------------------------------

    def wake(self) -> None:
        """Starts vLLM the first time. Memory comes back in `load_weights`, piece by piece."""
        if self._llm is None:
            with isolated(self.log_file, keep="VLLM_"):
                self._llm = self._start()
                if self.cuda:
                    # One: more would spin beside its loop, and what it compiled is guarded by
                    # their number (vLLM 0.32.0).
                    self._threads = torch.get_num_threads()
            log.info(self.room())

    def room(self) -> str:
        """How many tokens the engine's cache holds, for the log."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        tokens, longest = cache.kv_cache_size_tokens or 0, self.max_model_len
        least = ""
        if self._shares_ranks and dist.get_world_size() > 1:
            least = ", as many as fit where the least of all ranks' memory is free"
        return f"vLLM's cache holds {tokens:,} tokens, {tokens // longest:,} of the longest{least}"

    def unsupported(self) -> str | None:
        """Why vLLM cannot run this model, or None; only its architecture is looked at."""
        with isolated(self.log_file, keep="VLLM_"):
            known = import_vllm(self.log_file).ModelRegistry.get_supported_archs()
        if any(name in known for name in self.architectures):
            return None
        return f"vLLM has no {' or '.join(self.architectures) or 'such architecture'}"

    def _start(self) -> Any:
        """A vllm.LLM; must run inside `isolated`.

        Raises:
            UserError: vLLM is not installed, cannot run the model, or has too little memory.
        """
        vllm = import_vllm(self.log_file)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # vLLM's end is that of the process group it uses, which then is the trainer's.
        self._shares_ranks = dist.is_initialized()
        if self._shares_ranks and dist.get_world_size() > 1:
            check_joined(self.tensor_parallel, dist.get_world_size(), "processes of this run")
            self.options.setdefault("distributed_executor_backend", "external_launcher")
            announce_ranks()
        try:
            return vllm.LLM(**self._arguments())
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise UserError(
                f"engine.options has a name that vLLM does not know: {error}."
            ) from error
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(self._start_problem(error)) from error

    def _arguments(self) -> dict[str, Any]:
        arguments = {
            "model": self.path,
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "generation_config": "vllm",  # the model's own adds end tokens to those asked for
            "load_format": "dummy",  # weights come with the first sync
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "tensor_parallel_size": self.tensor_parallel,
            "enforce_eager": self.enforce_eager,
            "kv_cache_dtype": self.kv_cache_dtype,
            "enable_chunked_prefill": self.chunked_prefill,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",  # after temperature
            "disable_log_stats": True,
            "seed": 0,  # of requests without one; ours all have one
        }
        if self.cuda:
            arguments["gpu_memory_utilization"] = self.gpu_memory_share
            arguments["enable_sleep_mode"] = self.sleep_level > 0
        else:
            arguments["block_size"] = 32  # 128 by default: shorter prompts would never be shared
        if self.kv_cache_gb is not None or not self.cuda:
            arguments["kv_cache_memory_bytes"] = int((self.kv_cache_gb or 1.0) * GIB)
        return arguments | self.options

    def _start_problem(self, error: Exception) -> str:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        key = (
            "engine.kv_cache_gb" if self.kv_cache_gb or not self.cuda else "engine.gpu_memory_share"
        )
        mend = f"Raise {key}" if "memory" in reason.lower() else "Take engine=transformers"
        return f"vLLM could not start for {self.path}: {reason} {mend}; {self.log_file} has it all."

    def sleep(self) -> None:
        if self._llm is not None and self.sleep_level and not self.asleep:
            self._llm.sleep(level=self.sleep_level)
            self.asleep = True
            self.version = -1

    def close(self) -> None:
        """Ends vLLM; among several ranks it ends with the process."""
        self.version = -1
        if self._llm is not None and not self._shares_ranks:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    # --- weights ----------------------------------------------------------------------------

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Reloads in place, tensor by tensor; old prefixes are forgotten.

        Raises:
            RuntimeError: names or shapes that are not the model's, or blocks still in use.
        """
        if self.asleep:
            self._llm.wake_up(tags=["weights"])
        named = checked_weights(named_tensors, self.shapes)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
        self._llm.apply_model(repack_tied_head)
        if self.asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes of the old weights: its cache was in use.")
        self.version = version

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probs, at temperature 1, of every token but the first of each sequence."""
        import vllm

        params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        with torch_threads(self._threads):
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        scores = []
        for output, sequence in zip(outputs, sequences, strict=True):
            after = zip(output.prompt_logprobs[1:], sequence[1:], strict=True)
            scores.append(torch.tensor([found[token].logprob for found, token in after]))
        return scores

    # --- sampling ---------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        expected_version: int,
        on_response: OnResponse | None = None,
    ) -> list[list[Response]]:
        check_version(self, expected_version)
        import vllm

        requests, mine = together(requests, self.tensor_parallel)
        shared = self.sampling(params) | {"flat_logprobs": True, "detokenize": False}
        places = longest_first(requests)
        ids = self._llm.enqueue(
            [{"prompt_token_ids": list(requests[i].token_ids)} for i, _ in places],
            [vllm.SamplingParams(**shared, seed=requests[i].seeds[k]) for i, k in places],
            use_tqdm=False,
        )
        # vLLM appends random letters to the number that its outputs have.
        place_of = {id_.partition("-")[0]: p for id_, p in zip(ids, places, strict=True)}
        responses = Responses(requests[mine], on_response)
        with torch_threads(self._threads):
            while self._llm.llm_engine.has_unfinished_requests():
                for output in self._llm.llm_engine.step():
                    (done,), (i, k) = output.outputs, place_of[output.request_id]
                    if mine.start <= i < mine.stop:
                        made = response(done.finish_reason, done.token_ids, done.logprobs.logprobs)
                        responses.add(i - mine.start, k, made)
        return responses.groups()


def together(requests: Sequence[Request], size: int) -> tuple[list[Request], slice]:
    """The requests of all ranks that hold one engine together, and which of them are this rank's.

    Such ranks, `size` consecutive ones, must ask vLLM for the same. Collective if size > 1.
    """
    if size == 1:
        return list(requests), slice(0, len(requests))
    rank = world()[0]
    first = rank - rank % size
    parts = all_gather(list(requests))[first : first + size]
    start = sum(len(part) for part in parts[: rank - first])
    return [r for part in parts for r in part], slice(start, start + len(requests))


def import_vllm(log_file: Path) -> ModuleType:
    """vLLM, with its log in a file; must run inside `isolated`.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    logger = logging.getLogger("vllm")
    handlers = [h for h in logger.handlers if isinstance(h, logging.FileHandler)]
    if [handler.baseFilename for handler in handlers] != [str(log_file.absolute())]:
        for handler in handlers:  # of an engine before this one
            logger.removeHandler(handler)
            handler.close()
        logger.addHandler(logging.FileHandler(log_file))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        import vllm
    except ImportError as error:
        raise UserError(f"{NOT_INSTALLED} ({error})") from error
    return vllm


def response(reason: str | None, token_ids: Sequence[int], logprobs: Sequence[float]) -> Response:
    """A Response from what vLLM says of one.

    Raises:
        RuntimeError: the request was aborted.
    """
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {reason!r}.")
    return Response(
        token_ids=torch.tensor(token_ids),
        logprobs=torch.tensor(logprobs, dtype=torch.float32),
        truncated=reason == "length",
        near_ties=0,  # vLLM does not draw by inverse CDF
    )


def repack_tied_head(model: nn.Module) -> None:
    """Packs the output head anew on a CPU: where it is the embedding, a reload leaves the packed
    copy as it was (vLLM 0.32.0)."""
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear") and head.weight.numel():
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def announce_ranks() -> None:
    """Sets what vLLM's external launcher reads, where the trainer's launcher did not."""
    rank = dist.get_rank()
    local_rank = torch.cuda.current_device() if torch.cuda.is_available() else rank
    facts = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": dist.get_world_size(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,  # unused: the process group that exists is taken
    }
    for name, value in facts.items():
        os.environ.setdefault(name, str(value))
