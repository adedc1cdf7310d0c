"""Two gloo ranks with an engine each: both start, draw, and leave the ranks' traffic working."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlzoo.engines.vllm import VLLMEngine
from tests import forked
from tests.engines.test_vllm import EOS, PARAMS, gaps, make_policy, requests

pytestmark = pytest.mark.vllm


def draw_on_a_rank(rank: int, folder: str, tensor_parallel: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    lengths = {"max_prompt_tokens": 32, "max_response_tokens": 32}
    log_file = f"{folder}/{rank}.log"
    engine = VLLMEngine(
        folder,
        [EOS],
        kv_cache_gb=0.1,
        max_num_seqs=64,
        tensor_parallel=tensor_parallel,
        log_file=log_file,
        **lengths,
    )
    engine.wake()
    policy = make_policy(7)
    engine.load_weights(policy.named_parameters(), 1)
    sizes = (4, 1, 0, 2) if rank == 0 else (4, 0, 3, 2)  # each its own share, ragged
    drawn = engine.generate(requests(*sizes), PARAMS, 1)
    assert [len(group) for group in drawn] == list(sizes)
    total = torch.tensor([float(sum(map(len, drawn)))])
    dist.all_reduce(total)
    first = [response.token_ids.tolist() for response in drawn[0]]
    torch.save((first, float(total), float(gaps(policy, engine, 1).max())), f"{folder}/{rank}.pt")
    engine.close()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("tensor_parallel", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_with_an_engine_each_or_one_together(tmp_path: Path, tensor_parallel: int):
    make_policy().save_pretrained(tmp_path)
    arguments = (str(tmp_path), tensor_parallel)
    forked.on_ranks(draw_on_a_rank, arguments, 2)
    (one, total, gap), (two, same_total, other_gap) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert total == same_total == 7 + 9
    assert max(gap, other_gap) < 1e-4
    assert one == two  # the same prompt, seeds and weights
