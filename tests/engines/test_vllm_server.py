"""Two real `vllm serve` replicas on loopback: spread, weights, one that dies."""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rlzoo.engines.base import Request, Response, SamplingParams
from rlzoo.engines.vllm_server import VLLMServerEngine, serve_command
from rlzoo.engines.weight_transfer import FanOut, Replica, choose_transfer
from rlzoo.errors import UserError
from rlzoo.models.policy import load_policy
from tests.forked import Program, free_port

pytestmark = pytest.mark.vllm
LENGTHS = {"max_prompt_tokens": 64, "max_response_tokens": 64}
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill")
OPTIONS += ("--kv-cache-memory-bytes", str(2**28))
NCCL = ("--weight-transfer-config", '{"backend": "nccl"}')
PARAMS = SamplingParams(1.0, 24)


@pytest.fixture(scope="module")
def policy_path() -> str:
    return str(Path(__file__).parents[2] / "rlzoo" / "models" / "tiny")


@pytest.fixture(scope="module")
def replicas(policy_path, tmp_path_factory):
    """{address: process}, both answering, both with a key; only the first was started for the nccl
    transfer."""
    folder = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "a key")  # of the servers, and of the engines in these tests
        with served(policy_path, folder, [(*OPTIONS, *NCCL), OPTIONS]) as found:
            yield found


@contextmanager
def served(
    policy_path: str, folder: Path, options: Sequence[Sequence[str]], **variables: str
) -> Iterator[dict[str, Program]]:
    """{address: process} of replicas, one for each of `options`, answering."""
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"} | variables
    found = {}
    try:
        for own in options:
            port = free_port()
            module, *arguments = serve_command(policy_path, port, 128, *own)[2:]  # python -m
            log = folder / f"{port}.log"
            process = Program(module, arguments, log, variables=environment)
            found[f"http://127.0.0.1:{port}"] = process
        for address, process in found.items():
            wait_for(address, process, folder)
        yield found
    finally:
        for process in found.values():
            kill(process)


def wait_for(address: str, process: Program, folder: Path) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
            return
        except OSError:
            assert process.poll() is None, "\n".join(p.read_text() for p in folder.iterdir())
            time.sleep(0.5)
    raise TimeoutError(address)


def kill(process: Program) -> None:
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def make(policy_path: str, addresses: list[str], **options: object) -> VLLMServerEngine:
    return VLLMServerEngine(policy_path, [0], addresses=addresses, **LENGTHS | options)


def requests(count: int, each: int) -> list[Request]:
    return [
        Request(tuple(range(3, 10 + i)), tuple(1000 * i + j for j in range(each)))
        for i in range(count)
    ]


def drawn_tokens(engine: VLLMServerEngine, wanted: list[Request], version: int) -> list:
    drawn = engine.generate(wanted, PARAMS, version)
    return [[response.token_ids.tolist() for response in group] for group in drawn]


def test_a_real_server_names_its_backend_and_takes_the_calls_of_a_transfer(replicas, policy_path):
    """All of it but nccl itself, which needs GPUs."""
    engine = make(policy_path, list(replicas))
    engine.wake()
    assert engine.transfer == "folder" or torch.cuda.is_available()
    first, second = engine.replicas.everywhere(engine._ask_replica).values()
    for found, backend in ((first, "nccl"), (second, None)):
        assert found == Replica(found.address, backend, 1, "default")
    backends = {first.address: first.backend, second.address: second.backend}
    with pytest.raises(UserError, match=f"{second.address} names no transfer backend"):
        choose_transfer("nccl", True, backends)

    client = FanOut([first], 60.0, "a key")
    client.version = "3"
    client.shutdown_weight_transfer_engine()  # as at every start, when there is nothing to end
    client.start_weight_update()
    with pytest.raises(RuntimeError, match="NCCL weight transfer not initialized"):
        client.update_weights({"names": [], "dtype_names": [], "shapes": []})
    client.start_weight_update()
    client.finish_weight_update()
    held = engine.replicas.everywhere(engine._ask_replica)[first.address]
    assert held == first._replace(weight_version="3")
    with pytest.raises(RuntimeError, match="weight_transfer_config"):
        FanOut([second], 60.0, "a key").start_weight_update()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, test_vllm_gpu.py sends weights")
def test_a_sync_by_nccl_reaches_vllms_own_transfer_and_a_failure_is_told(
    replicas, policy_path, tmp_path, monkeypatch
):
    address, log_file = list(replicas)[0], tmp_path / "vllm.log"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it is not, as both ends find
    engine = make(policy_path, [address], transfer="nccl", log_file=str(log_file))
    engine.wake()
    assert engine.transfer == "nccl"
    for version in range(2):  # a failure leaves nothing behind that the next sync trips over
        with pytest.raises(RuntimeError, match="sync to the servers failed: .*accelerator"):
            engine.load_weights(load_policy("tiny").named_parameters(), version)
    engine.close()
    assert "Creating weight transfer trainer engine: NCCLTrainer" in log_file.read_text()


def test_a_real_server_lets_nobody_in_without_its_key(replicas, policy_path, monkeypatch):
    for address in replicas:
        for path in ("/collective_rpc", "/inference/v1/generate", "/server_info", "/version"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{address}{path}", data=b"{}", timeout=20)
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(UserError, match="asks for a key, and this run sends none"):
        make(policy_path, list(replicas)).wake()


def test_two_replicas_share_a_draw_hold_new_weights_and_lose_nothing_when_one_dies(
    replicas, policy_path, caplog
):
    engine, policy = make(policy_path, list(replicas)), load_policy("tiny")
    engine.wake()
    for version in range(2):  # weights as they are, then others
        engine.load_weights(policy.named_parameters(), version)
        sequences = [list(range(3, 40)), list(range(60, 90))]
        for scores, sequence in zip(engine.score(sequences), sequences, strict=True):
            with torch.no_grad():
                logprobs = policy(torch.tensor([sequence])).logits[0].log_softmax(-1)
            expected = logprobs[torch.arange(len(sequence) - 1), sequence[1:]]
            assert (scores - expected).abs().max() < 1e-4
        for parameter in policy.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    wanted, told = requests(12, 4), {}
    drawn = engine.generate(wanted, PARAMS, 1, lambda i, k, r: told.update({(i, k): r}))
    assert [len(group) for group in drawn] == [4] * 12 and len(told) == 48
    assert all(told[i, k] is r for i, group in enumerate(drawn) for k, r in enumerate(group))
    before = [[response.token_ids.tolist() for response in group] for group in drawn]

    victim = list(replicas)[0]
    engine.concurrency = 4
    seen = []

    def kill_in_the_middle(request: int, index: int, _: Response) -> None:
        seen.append((request, index))
        if len(seen) == 10:
            kill(replicas[victim])

    again = engine.generate(wanted, PARAMS, 1, kill_in_the_middle)
    assert [len(group) for group in again] == [4] * 12 and len(seen) == len(set(seen)) == 48
    flat = [r.token_ids.tolist() for group in again for r in group]
    kept = sum(a == b for a, b in zip(flat, sum(before, []), strict=True))
    assert kept >= 40  # seeds are the responses' own; other batches may move a last bit
    assert engine.replicas.alive == [a for a in replicas if a != victim]
    assert f"{victim} no longer answers" in caplog.text

    engine.load_weights(policy.named_parameters(), 2)  # goes on with the one that is left
    assert len(drawn_tokens(engine, wanted, 2)) == 12
    kill(replicas[list(replicas)[1]])
    with pytest.raises(RuntimeError, match="No replica .* is left, with 48 of 48"):
        engine.generate(wanted, PARAMS, 2)


def test_an_address_that_does_not_answer_comes_with_the_command_that_starts_one(policy_path):
    engine = make(policy_path, [f"http://127.0.0.1:{free_port()}"])
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1 python -m vllm"):
        engine.wake()


GOOD = {
    "vllm": "0.32.0",
    "version": -1,
    "architectures": ["Qwen2ForCausalLM"],
    "max_model_len": 128,
    "logprobs_mode": "processed_logprobs",
    "dtype": "float32",
}


@pytest.mark.parametrize(
    "other, words",
    [
        ({"vllm": "0.31.1"}, "runs vLLM 0.31.1, rlzoo speaks to 0.32.0"),
        ({"hidden_size": 99}, "serves another model .* hidden_size=99"),
        ({"max_model_len": 64}, "--max-model-len 128"),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
    ],
)
def test_a_server_of_another_kind_is_named_with_its_mend(policy_path, other, words):
    engine = make(policy_path, ["http://localhost:1"])
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    described = GOOD | {name: getattr(engine.config, name) for name in names}
    engine._check_replica("http://localhost:1", described)
    with pytest.raises(UserError, match=words):
        engine._check_replica("http://localhost:1", described | other)
