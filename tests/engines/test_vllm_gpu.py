"""What vLLM does on GPUs alone: memory given back and taken again, engines over two GPUs, weights
by nccl. Each engine has a process of its own. On a CPU the first test runs without a sleep.

They compute in bfloat16: a mean gap of up to GAP nats is rounding, stale weights are far over it.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlzoo.engines.vllm import VLLMEngine
from rlzoo.models.policy import load_policy
from tests.engines.test_vllm import EOS, GAP, PARAMS, gaps, make_policy, requests
from tests.engines.test_vllm_server import NCCL, drawn_tokens, make, served
from tests.engines.test_vllm_server import requests as server_requests

pytestmark = pytest.mark.vllm
one_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SHARE = 0.2  # of a GPU's memory
TINY = str(Path(__file__).parents[2] / "rlzoo" / "models" / "tiny")


def make_engine(folder: str, rank: int = 0, **options: object) -> VLLMEngine:
    log_file = f"{folder}/{rank}.log"
    lengths = {"max_prompt_tokens": 32, "max_response_tokens": 32}
    common = {"gpu_memory_share": SHARE, "max_num_seqs": 64, "enforce_eager": True}
    if not torch.cuda.is_available():
        common["kv_cache_gb"] = 0.1
    return VLLMEngine(folder, [EOS], log_file=log_file, **lengths, **common | options)


def memory_used() -> float:
    """Share of the GPU's memory, in [0, 1]; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return 1 - free / total


def sleep_and_wake(rank: int, folder: str, level: int, eager: bool) -> None:
    """Three times over, with other weights after each sleep."""
    before = memory_used()
    engine = make_engine(folder, sleep_level=level, enforce_eager=eager)
    used = lambda: memory_used() - before  # noqa: E731
    engine.wake()
    engine.load_weights(make_policy(3).named_parameters(), 1)
    first = float(gaps(make_policy(3), engine, 1).mean())
    found = {"awake": [used()], "gaps": [first], "asleep": [], "versions": [], "loading": []}
    for seed in range(4, 7):
        engine.sleep()
        found["asleep"].append(used())
        found["versions"].append(engine.version)

        def weights(seed: int = seed):
            yield from make_policy(seed).named_parameters()
            found["loading"].append(used())

        engine.load_weights(weights(), seed)
        found["awake"].append(used())
        found["gaps"].append(float(gaps(make_policy(seed), engine, seed).mean()))
    torch.save(found, f"{folder}/found.pt")
    engine.close()


def after_sleeps(folder: Path, level: int, eager: bool) -> dict[str, list[float]]:
    make_policy().save_pretrained(folder)
    arguments = (str(folder), level, eager)
    mp.start_processes(sleep_and_wake, arguments, nprocs=1, start_method="spawn")
    found = torch.load(folder / "found.pt", weights_only=True)
    assert len(found["gaps"]) == 4 and max(found["gaps"]) < GAP
    return found


@pytest.mark.parametrize(
    "level, eager",
    [
        pytest.param(0, True, marks=one_gpu),
        pytest.param(1, True, marks=one_gpu),
        pytest.param(2, True, marks=one_gpu),
        pytest.param(2, False, marks=one_gpu, id="2-graphs"),
    ],
)
def test_an_engine_takes_its_share_sleeps_and_makes_its_cache_after_its_weights(
    tmp_path, level, eager, record_property
):
    found = after_sleeps(tmp_path, level, eager)
    awake, asleep = found["awake"], found["asleep"]
    record_property(f"gap_level_{level}_{'eager' if eager else 'graphs'}", max(found["gaps"]))
    assert 0.7 * SHARE < awake[0] < 1.2 * SHARE  # nearly all of it is cache
    assert all(abs(again - awake[0]) < 0.2 * SHARE for again in awake)
    if level == 0:
        assert found["versions"] == [1, 4, 5]
        assert all(abs(held - awake[0]) < 0.2 * SHARE for held in asleep)
    else:
        assert found["versions"] == 3 * [-1] and max(asleep) < 0.5 * SHARE
        assert max(asleep) - min(asleep) < 0.05 * SHARE  # no sleep keeps more than the one before
        assert max(found["loading"]) < 0.5 * SHARE  # tag "weights" first, "kv_cache" once loaded


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_an_engine_never_sleeps(tmp_path):
    assert after_sleeps(tmp_path, level=2, eager=False)["versions"] == [1, 4, 5]


def draw_on_a_pair(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    engine = make_engine(folder, rank, tensor_parallel=2)
    engine.wake()
    for version in range(2):  # the second after a sleep
        engine.load_weights(make_policy(version).named_parameters(), version)
        drawn = engine.generate(requests(3, 0, 5, 2), PARAMS, version)
        gap = float(gaps(make_policy(version), engine, version).mean())
        engine.sleep()
    executor = engine.options["distributed_executor_backend"]
    tokens = [response.token_ids.tolist() for group in drawn for response in group]
    torch.save((executor, tokens, gap), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu
@two_gpus
def test_two_ranks_hold_one_engine_together_and_draw_the_same(tmp_path):
    make_policy().save_pretrained(tmp_path)
    mp.start_processes(draw_on_a_pair, (str(tmp_path),), nprocs=2, start_method="spawn")
    (executor, one, gap), (_, two, other_gap) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert executor == "external_launcher" and one == two
    assert max(gap, other_gap) < GAP


def mean_gap(engine, policy) -> float:
    sequences = [list(range(3, 40)), list(range(60, 90))]
    found = []
    for scores, sequence in zip(engine.score(sequences), sequences, strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([sequence]).cuda()).logits[0].float().cpu()
        logprobs = logits.log_softmax(-1)
        found.append((scores - logprobs[torch.arange(len(sequence) - 1), sequence[1:]]).abs())
    return float(torch.cat(found).mean())


@pytest.mark.gpu
@two_gpus
def test_weights_reach_every_replica_by_nccl_and_a_second_trainer_finds_them_free(tmp_path):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    options = [("--dtype", "bfloat16", "--enforce-eager", "--gpu-memory-utilization", "0.3", *NCCL)]
    policy = load_policy("tiny").cuda()  # on the first device; replicas take one each of the others
    with ExitStack() as stack:
        addresses = []
        for device in devices[1:3]:
            servers = served(TINY, tmp_path, options, CUDA_VISIBLE_DEVICES=device)
            addresses += list(stack.enter_context(servers))
        for version in (0, 2):  # two trainers, one after the other
            engine = make(TINY, addresses, log_file=str(tmp_path / "vllm.log"))
            engine.wake()
            assert engine.transfer == "nccl"  # auto takes it
            engine.load_weights(policy.named_parameters(), version)
            for parameter in policy.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            assert each_gap(engine, policy, addresses) > 3 * GAP  # old weights show
            engine.load_weights(policy.named_parameters(), version + 1)
            assert each_gap(engine, policy, addresses, worst=max) < GAP
            assert len(drawn_tokens(engine, server_requests(6, 4), version + 1)) == 6
            engine.close()


def each_gap(engine, policy, addresses, worst=min) -> float:
    """The smallest (or largest) gap of a replica that is asked alone."""
    found = []
    for engine.replicas.alive in [[address] for address in addresses]:
        found.append(mean_gap(engine, policy))
    engine.replicas.alive = list(addresses)
    return worst(found)
