"""The trainer's end of vLLM's nccl transfer, as far as a CPU goes: vLLM's own classes, and servers
on loopback that record what they are asked. test_vllm_server.py asks real servers, and
test_vllm_gpu.py sends weights."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rlzoo.engines.vllm_server import VLLMServerEngine
from rlzoo.engines.weight_transfer import (
    FanOut,
    NcclTransfer,
    Replica,
    Weights,
    ask_replica,
    choose_transfer,
    meeting_point,
    rank_offsets,
    same_group,
    trainer_info,
)
from rlzoo.errors import UserError
from rlzoo.models.policy import load_policy
from tests import forked

pytestmark = pytest.mark.vllm
TINY = str(Path(__file__).parents[2] / "rlzoo" / "models" / "tiny")
LENGTHS = {"max_prompt_tokens": 64, "max_response_tokens": 64}


def replica(address: str, gpus: int = 1, version: str = "default") -> Replica:
    return Replica(address, "nccl", gpus, version)


def accept(path: str, body: dict | None) -> tuple[int, object]:
    return 200, {}


@contextmanager
def recorder(answer: Callable[[str, dict | None], tuple[int, object]] = accept):
    """A server that keeps (path, body) of every POST, and its key; answers what `answer` says."""
    heard, keys = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            heard.append((self.path, body))
            keys.append(self.headers.get("Authorization"))
            status, content = answer(self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        yield SimpleNamespace(address=address, heard=heard, keys=keys)
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def recorders(count: int):
    """Servers that answer a call only once all of them have been asked, as nccl has it."""
    together = threading.Barrier(count)

    def answer(path: str, body: dict | None) -> tuple[int, object]:
        together.wait(timeout=20)
        return 200, {}

    with recorder(answer) as one, recorder(answer) as two, recorder(answer) as three:
        yield [one, two, three][:count]


def test_the_ranks_of_all_gpus_are_distinct_and_fill_the_group():
    replicas = [replica("http://127.0.0.1:1", 2), replica("http://127.0.0.1:2"), replica("b", 4)]
    # vLLM's worker_init_process_group: rank_offset + data-parallel index x world size + own rank
    ranks = [
        offset + gpu
        for offset, r in zip(rank_offsets(replicas), replicas, strict=True)
        for gpu in range(r.gpus)
    ]
    assert ranks == [1, 2, 3, 4, 5, 6, 7]
    info = trainer_info(replicas[:2])
    assert (info.rank, info.world_size, info.is_sender, info.backend) == (0, 4, True, "nccl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, vLLM waits for real workers")
def test_vllms_own_start_asks_all_replicas_at_once_and_gives_each_its_ranks():
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

    with recorders(3) as servers:
        sizes = (2, 1, 4)
        replicas = [replica(s.address, n) for s, n in zip(servers, sizes, strict=True)]
        client, info = FanOut(replicas, 30.0), trainer_info(replicas)
        with pytest.raises(RuntimeError, match="accelerator"):  # its own end needs a GPU
            WeightTransferTrainerFactory.trainer_init(info, client=client, source=Weights())
        asked = [s.heard for s in servers]
    for heard in asked:
        assert [path for path, _ in heard] == ["/init_weight_transfer_engine"]
    told = [NCCLWeightTransferInitInfo(**heard[0][1]["init_info"]) for heard in asked]
    assert [t.rank_offset for t in told] == [1, 3, 4]
    for t in told:
        assert (t.world_size, t.packed) == (8, info.packed)
        assert (t.master_address, t.master_port) == (info.master_address, info.master_port)
        assert t.packed_buffer_size_bytes == info.packed_buffer_size_bytes


def test_a_sync_is_start_update_finish_with_its_version_at_every_replica():
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    source = Weights("cpu")
    source.named = {"a.weight": torch.zeros(3, 2, dtype=torch.bfloat16), "b": torch.ones(4)}
    meta = source.metadata()
    update = asdict(
        NCCLWeightTransferUpdateInfo(
            names=[m.name for m in meta],
            dtype_names=[str(m.dtype).split(".")[-1] for m in meta],
            shapes=[list(m.shape) for m in meta],
        )
    )
    with recorders(2) as servers:
        client = FanOut([replica(s.address) for s in servers], 30.0)
        client.version = "7"
        client.start_weight_update()
        client.update_weights(update)
        client.finish_weight_update()
    expected = {"names": ["a.weight", "b"], "dtype_names": ["bfloat16", "float32"]}
    for server in servers:
        assert server.heard == [
            ("/start_weight_update", None),
            ("/update_weights", {"update_info": expected | {"shapes": [[3, 2], [4]]}}),
            ("/finish_weight_update", {"weight_version": "7"}),
        ]


def test_what_is_declared_is_what_is_sent_by_vllms_own_check():
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    source = Weights("cpu")
    source.named = {name: p.detach() for name, p in load_policy("tiny").named_parameters()}
    for _ in range(2):  # afresh at every sync
        sent = dict(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
        assert list(sent) == list(source.named)
        assert all(torch.equal(sent[name], source.named[name]) for name in sent)


def test_a_replica_that_fails_is_named_at_once_though_another_still_waits(caplog):
    released, ended = threading.Event(), []

    def stall(path: str, body: dict | None) -> tuple[int, object]:
        released.wait(15)
        ended.append(path)
        return 200, {}

    refuse = recorder(lambda path, body: (500, {"error": "out of memory"}))
    with refuse as one, recorder(stall) as two:
        client = FanOut([replica(two.address), replica(one.address)], 60.0)
        try:
            with pytest.raises(RuntimeError, match=f"{one.address} .* 500 .*out of memory"):
                client.update_weights({})
            assert ended == [] and one.address in caplog.text
            waiting = [t for t in threading.enumerate() if t.name == "weight sync"]
            assert waiting and all(t.daemon for t in waiting)  # the process may end meanwhile
        finally:
            released.set()


@pytest.mark.parametrize(
    "transfer, cuda, backends, taken",
    [
        ("folder", True, {"a": "nccl"}, "folder"),
        ("auto", True, {"a": "nccl", "b": "nccl"}, "nccl"),
        ("auto", True, {"a": "nccl", "b": None}, "folder"),
        ("auto", True, {"a": "ipc"}, "folder"),
        ("auto", False, {"a": "nccl"}, "folder"),
        ("nccl", True, {"a": "nccl"}, "nccl"),
    ],
)
def test_auto_takes_nccl_where_the_trainer_and_every_server_can(transfer, cuda, backends, taken):
    assert choose_transfer(transfer, cuda, backends) == taken


@pytest.mark.parametrize(
    "cuda, backends, words",
    [
        (False, {}, "no CUDA device.* engine.transfer=folder"),
        (True, {"http://a:1": "nccl", "http://b:1": None}, "http://b:1 names no transfer backend"),
        (True, {"http://b:1": "ipc"}, "http://b:1 names ipc transfer backend"),
        (True, {"http://b:1": None}, """--weight-transfer-config '{"backend": "nccl"}'"""),
    ],
)
def test_what_nccl_lacks_is_named_with_its_mend(cuda, backends, words):
    with pytest.raises(UserError, match=f"engine.transfer=nccl: .*{words}"):
        choose_transfer("nccl", cuda, backends)


def test_the_trainer_is_met_on_loopback_where_all_servers_are():
    host, port = meeting_point(["http://localhost:8000", "http://127.0.0.1:8001"])
    assert host == "127.0.0.1"
    with socket.create_server((host, port)):
        pass


def test_a_group_is_made_anew_for_a_replica_that_was_lost_started_anew_or_added():
    client = FanOut([replica("http://a:1", 2), replica("http://b:1")], 1.0)
    client.version = "4"
    a, b = replica("http://a:1", 2, "4"), replica("http://b:1", 1, "4")
    assert same_group(client, [a, b])
    assert not same_group(client, [a])
    assert not same_group(client, [a, b._replace(weight_version="default")])
    assert not same_group(client, [a, b, replica("http://c:1", 1, "4")])


def test_a_server_without_the_flag_is_refused_before_anything_is_asked_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with recorder() as server:
        transfer = NcclTransfer(5.0, tmp_path / "vllm.log")
        with pytest.raises(UserError, match=f"{server.address} names no transfer backend"):
            transfer.send({}, [replica(server.address)._replace(backend=None)], 0)
    assert server.heard == []


def test_a_server_is_asked_for_its_backend_gpus_and_version():
    answers = {
        "server_info?config_format=json": {"vllm_config": {"weight_transfer_config": None}},
        "get_world_size": {"world_size": 2},
        "weight_info": {"weight_version": "3"},
    }

    async def get(url: str) -> dict:
        return answers[url.removeprefix("http://a:1/")]

    assert asyncio.run(ask_replica(get, "http://a:1")) == Replica("http://a:1", None, 2, "3")


def test_prefixes_that_a_server_keeps_stop_a_sync(tmp_path):
    def answer(path: str, body: dict | None) -> tuple[int, object]:
        return 200, {"results": [{"version": 5}], "success": path != "/reset_prefix_cache"}

    with recorder(answer) as server:
        engine = make(server.address, tmp_path)
        with pytest.raises(RuntimeError, match="kept prefixes of the old weights"):
            engine.load_weights(load_policy("tiny").named_parameters(), 5)
    assert [path for path, _ in server.heard] == ["/collective_rpc", "/reset_prefix_cache"]
    engine.close()
    assert not list(tmp_path.iterdir())


def make(address: str, folder: Path, **options: object) -> VLLMServerEngine:
    return VLLMServerEngine(TINY, [0], addresses=[address], folder=str(folder), **LENGTHS | options)


def gathered(seen: list[str]):
    """Named weights whose every step is collective, as FSDP's are."""
    for name, parameter in load_policy("tiny").named_parameters():
        dist.all_reduce(torch.zeros(1))
        seen.append(name)
        yield name, parameter


def sync_on_a_rank(rank: int, addresses: list[str], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    engine, seen, problems = make(addresses[rank], Path(folder)), [], []
    for version in (5, 6):  # the server answers as if it held 5: the second fails
        try:
            engine.load_weights(gathered(seen), version)
        except RuntimeError as error:
            problems.append(str(error))
    Path(folder, f"{rank}.json").write_text(json.dumps([len(seen), problems, engine.version]))
    dist.destroy_process_group()


def test_every_rank_walks_the_weights_rank_0_sends_them_and_all_learn_of_a_failure(tmp_path):
    def answer(path: str, body: dict | None) -> tuple[int, object]:
        return 200, {"results": [{"version": 5}], "success": True}

    with recorder(answer) as first, recorder(answer) as second:
        arguments = ([first.address, second.address], str(tmp_path))
        forked.on_ranks(sync_on_a_rank, arguments, 2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    walked, problems, version = ranks[0]
    assert walked == 2 * len(list(load_policy("tiny").named_parameters())) and version == 5
    assert len(problems) == 1 and "holds versions [5] after a sync of 6" in problems[0]
    assert len(first.heard) == 3 and second.heard == []


def test_nccl_without_cuda_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="engine.transfer=nccl: the trainer has no CUDA device"):
        make("http://127.0.0.1:1", tmp_path, transfer="nccl")
