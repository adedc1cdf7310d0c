"""Weights from the trainer's GPU to those of `vllm serve` replicas: vLLM 0.32's own nccl transfer.

Rank 0 of the trainer is rank 0 of an nccl group, the GPUs of the replicas are the rest of it. A
sync is start, update and finish at every replica, over HTTP; a broadcast goes with the update. The
group is made at the first sync, and anew when a replica leaves or returns.

Written from vLLM's source; no GPU has run it yet (docs/engines.md says what was tested).
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlzoo.engines.http import bearer
from rlzoo.engines.isolation import isolated
from rlzoo.engines.vllm import import_vllm
from rlzoo.errors import UserError

log = logging.getLogger(__name__)

FLAG = """--weight-transfer-config '{"backend": "nccl"}'"""


class Replica(NamedTuple):
    """What a server says of itself."""

    address: str
    backend: str | None  # of its --weight-transfer-config; None if it was started without
    gpus: int  # tensor x pipeline x data parallel
    weight_version: str  # of the last finished update; "default" before the first


async def ask_replica(get: Callable[[str], Awaitable[Any]], address: str) -> Replica:
    """Asks a server in dev mode; `get(url)` is the answer's JSON."""
    server = await get(f"{address}/server_info?config_format=json")
    config = server["vllm_config"]["weight_transfer_config"]
    size = await get(f"{address}/get_world_size")
    held = await get(f"{address}/weight_info")
    backend = config["backend"] if config else None
    return Replica(address, backend, size["world_size"], held["weight_version"])


def choose_transfer(transfer: str, cuda: bool, backends: Mapping[str, str | None]) -> str:
    """What engine.transfer comes to: folder or nccl.

    Args:
        transfer: auto, folder or nccl.
        cuda: whether the trainer has a CUDA device.
        backends: {address: what it was started with}; None: without any, or it did not answer.

    Raises:
        UserError: transfer=nccl where that cannot be.
    """
    why_not = why_not_nccl(cuda, backends)
    if transfer == "nccl" and why_not:
        raise UserError(f"engine.transfer=nccl: {why_not}, or take engine.transfer=folder.")
    if transfer == "auto" and why_not:
        log.info("engine.transfer=auto takes folder: %s", why_not)
    return "folder" if transfer == "folder" or why_not else "nccl"


def why_not_nccl(cuda: bool, backends: Mapping[str, str | None]) -> str | None:
    """What is missing, with its mend, or None."""
    if not cuda:
        return "the trainer has no CUDA device; run it on a GPU"
    if importlib.util.find_spec("vllm") is None:
        return "the trainer needs vLLM too, and has none; install rlzoo[vllm]"
    for address, backend in backends.items():
        if backend != "nccl":
            return f"{address} names {backend or 'no'} transfer backend; start it with {FLAG}"
    return None


def rank_offsets(replicas: Sequence[Replica], first: int = 1) -> list[int]:
    """Rank of each replica's first GPU in the group; the trainer is rank 0."""
    return list(itertools.accumulate((r.gpus for r in replicas[:-1]), initial=first))


def meeting_point(addresses: Sequence[str]) -> tuple[str, int]:
    """This machine's IPv4 address towards the first server that is elsewhere, and a free port.

    Raises:
        OSError: a name that does not resolve, or no way there.
    """
    hosts = [socket.gethostbyname(urlsplit(address).hostname or "") for address in addresses]
    elsewhere = [host for host in hosts if not host.startswith("127.")]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way, socket.socket() as probe:
        way.connect((elsewhere[0] if elsewhere else hosts[0], 9))
        probe.bind((way.getsockname()[0], 0))
        host, port = probe.getsockname()
        return host, port


def trainer_info(replicas: Sequence[Replica]) -> Any:
    """vLLM's NCCLTrainerInitInfo for the trainer's rank 0 and every GPU of the replicas."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    host, port = meeting_point([replica.address for replica in replicas])
    size = 1 + sum(replica.gpus for replica in replicas)
    return NCCLTrainerInitInfo(rank=0, master_address=host, master_port=port, world_size=size)


class Weights:
    """vLLM's `WeightSource`: declares the tensors of a sync, and then yields the same."""

    def __init__(self, device: str = "cuda") -> None:
        self.named: Mapping[str, Tensor] = {}  # on any device, in the order of the model's modules
        self.device = device  # that nccl sends from

    def metadata(self) -> list[Any]:
        """vLLM's ParamMeta of each tensor."""
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.named.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.named.items():
            yield name, tensor.to(self.device)


class FanOut:
    """vLLM's `VLLMWeightSyncClient` of several servers: each call goes to all of them at once, for
    each waits, in nccl, for the others.

    Args:
        replicas: in the order of their ranks.
        timeout: seconds that an answer may take.
        key: sent with every request; None sends none.
    """

    def __init__(self, replicas: Sequence[Replica], timeout: float, key: str | None = None) -> None:
        self.replicas = list(replicas)
        self.clients = [client_of(r.address, timeout, key) for r in replicas]
        self.version = "default"  # of the weights being sent; vLLM's trainer passes none on

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = rank_offsets(self.replicas, init_info["rank_offset"])
        infos = [init_info | {"rank_offset": offset} for offset in offsets]
        self._all(lambda client, info: client.init_weight_transfer_engine(info), infos)

    def start_weight_update(self) -> None:
        self._all(lambda client: client.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self._all(lambda client: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(lambda client: client.finish_weight_update(weight_version or self.version))

    def shutdown_weight_transfer_engine(self) -> None:
        self._all(lambda client: client.shutdown_weight_transfer_engine())

    def _all(self, call: Callable[..., None], *arguments: list[Any]) -> None:
        """Calls every server.

        Raises:
            RuntimeError: the first that fails. The others may wait for it in nccl for ever, so they
                are not waited for; the trainer may be waiting there too, so it is logged first.
        """
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def ask(client: Any, *own: Any) -> None:
            try:
                call(client, *own)
                answers.put((client, None))
            except Exception as error:  # whatever it is, the caller raises it
                answers.put((client, error))

        for place in zip(self.clients, *arguments, strict=True):
            # A daemon: the process may end though a server still waits.
            Thread(target=ask, args=place, daemon=True, name="weight sync").start()
        for _ in self.clients:
            client, error = answers.get()
            if error is not None:
                answer = getattr(getattr(error, "response", None), "text", "")
                problem = f"{client.base_url} failed in a weight sync: {error} {answer}".strip()
                log.error(problem)
                raise RuntimeError(problem) from error


def client_of(address: str, timeout: float, key: str | None) -> Any:
    """vLLM's client of one server, which itself sends no key."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient

    class Client(HTTPVLLMWeightSyncClient):
        def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
            import requests

            url, limit = f"{self.base_url}/{path}", self.timeout
            requests.post(url, json=json, timeout=limit, headers=bearer(key)).raise_for_status()

    return Client(address, timeout)


class NcclTransfer:
    """The trainer's end, on its rank 0.

    Args:
        timeout: seconds that a server's answer may take.
        log_file: where vLLM's messages go.
        key: sent with every request; None sends none.
    """

    def __init__(self, timeout: float, log_file: Path, key: str | None = None) -> None:
        self.timeout, self.log_file, self.key = timeout, log_file, key
        self.source = Weights()
        self.client: FanOut | None = None  # of the group, if there is one, as is the next
        self._engine: Any = None  # vLLM's TrainerWeightTransferEngine

    def send(self, named: Mapping[str, Tensor], replicas: Sequence[Replica], version: int) -> None:
        """Sends whole tensors to all replicas.

        Raises:
            UserError: a replica that was started without the nccl backend.
            RuntimeError, OSError: the transfer failed; replicas may have to be started again.
        """
        client = self.client
        if client is None or not same_group(client, replicas):
            self._drop()
            client = self._connect(replicas)
        self.source.named, client.version = named, str(version)
        torch.cuda.synchronize()  # vLLM packs on streams of its own, which await no optimizer step
        try:
            self._engine.send_weights()
        except BaseException:
            self._drop()  # vLLM: a group is unusable after an error
            raise
        finally:
            self.source.named = {}

    def _connect(self, replicas: Sequence[Replica]) -> FanOut:
        choose_transfer("nccl", torch.cuda.is_available(), {r.address: r.backend for r in replicas})
        with isolated(self.log_file, keep="VLLM_"):
            import_vllm(self.log_file)
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        client = FanOut(replicas, self.timeout, self.key)
        client.shutdown_weight_transfer_engine()  # an earlier trainer's group may be left
        self._engine = WeightTransferTrainerFactory.trainer_init(
            trainer_info(replicas),
            client=client,
            source=self.source,  # type: ignore[arg-type]  # a WeightSource in all but its class
        )
        if not self._engine.model_update_group.available:
            self._drop()
            raise RuntimeError("vLLM found no nccl library here: its transfer would send nothing.")
        self.client = client
        return client

    def close(self) -> None:
        """Lets the replicas go; they may be connected to again."""
        if self.client is not None:
            try:
                self.client.shutdown_weight_transfer_engine()
            except RuntimeError:
                log.warning("A replica kept its connection; the next trainer lets go of it.")
        self._drop()

    def _drop(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self.client = self._engine = None


def same_group(client: FanOut, replicas: Sequence[Replica]) -> bool:
    """Whether they took part in the client's last sync; one started anew since holds another."""
    return [r._replace(weight_version=client.version) for r in client.replicas] == list(replicas)
