"""1, 2 and 4 gloo processes draw the same responses for the same weights, each its own share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlzoo.data.draw import Drawer
from rlzoo.engines.base import SamplingParams
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.report.ledger import Ledger
from rlzoo.report.progress import Bars
from rlzoo.rewards.base import Scores
from rlzoo.types import Prompt
from tests import forked
from tests.conftest import make_tiny_model

BUDGETS = [3, 1, 40, 0, 2, 5, 1, 8]  # one prompt has two thirds
PROMPTS = [Prompt(f"p{i}", "", "", token_ids=tuple(range(3, 5 + 2 * i))) for i in range(8)]
STREAMS = ("pilot", "train")  # the second is shared out by the mean length of the first


class Recording(TransformersEngine):
    """Notes the seeds of every request."""

    def __init__(self) -> None:
        super().__init__(make_tiny_model, eos_token_ids=[0, 2], pad_token_id=1)
        self.load_weights(make_tiny_model(seed=3).named_parameters(), 0)
        self.seeds: list[list[tuple[int, ...]]] = []  # by draw, then request

    def generate(self, requests: Sequence[Any], *arguments: Any) -> Any:
        self.seeds.append([request.seeds for request in requests])
        return super().generate(requests, *arguments)


def reward(
    prompts: list[Prompt],
    texts: list[str],
    truncated: list[bool],
    on_progress: Callable[[int], None],
) -> Scores:
    """Something that differs between prompts and between responses."""
    pairs = zip(prompts, texts, strict=True)
    rewards = torch.tensor([int(p.id[1:]) + 0.01 * len(text) for p, text in pairs])
    return Scores(rewards, torch.tensor(truncated, dtype=torch.int8))


def drawn() -> list[dict]:
    """What this rank returns of each stream, and what its engine was asked for."""
    engine = Recording()
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
    params = SamplingParams(1.0, 24)
    drawer = Drawer(engine, reward, tokenizer, params, Ledger(), Bars(enabled=False), seed=5)
    found = []
    for stream, step in zip(STREAMS, (0, 1), strict=True):
        rollouts = drawer.draw(PROMPTS, BUDGETS, stream, step)
        found.append({**vars(rollouts), "prompts": [p.id for p in rollouts.prompts]})
        found[-1] |= {"seeds": engine.seeds[-1], "expected": drawer.expected_length()}
    return found


def draw_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for size in (4, 2):  # the same processes, since starting one takes seconds
        if rank < size:
            store = f"file://{folder}/store{size}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            torch.save(drawn(), f"{folder}/{size}_{rank}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_size(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict]]]:
    """By number of ranks, then rank, then stream."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    forked.on_ranks(draw_on_a_rank, (str(folder),), 4)
    load = lambda size, rank: torch.load(folder / f"{size}_{rank}.pt", weights_only=True)  # noqa: E731
    return {1: [drawn()]} | {size: [load(size, rank) for rank in range(size)] for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stream", range(2), ids=STREAMS)
def test_ranks_draw_the_responses_of_one_but_for_near_ties(by_size, stream, size):
    alone = by_size[1][0][stream]
    assert len(alone["responses"]) == sum(BUDGETS) and alone["num_near_ties"] <= 10
    assert len({tuple(r.tolist()) for r in alone["responses"]}) > sum(BUDGETS) / 2
    for rank in range(size):
        one = by_size[size][rank][stream]
        assert one["prompts"] == alone["prompts"]
        assert one["group_ids"].tolist() == alone["group_ids"].tolist()
        assert len(one["responses"]) == sum(BUDGETS)
        same = [
            a.tolist() == b.tolist()
            for a, b in zip(one["responses"], alone["responses"], strict=True)
        ]
        assert same.count(False) <= max(one["num_near_ties"], alone["num_near_ties"])
        for i in (i for i, is_same in enumerate(same) if is_same):
            assert one["rewards"][i] == alone["rewards"][i]
            assert one["truncated"][i] == alone["truncated"][i]
            gap = one["sampler_logprobs"][i] - alone["sampler_logprobs"][i]
            assert gap.abs().max() < 1e-5


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stream", range(2), ids=STREAMS)
def test_each_response_is_drawn_by_one_rank_and_the_large_group_by_several(by_size, stream, size):
    asked = [by_size[size][rank][stream]["seeds"] for rank in range(size)]
    alone = by_size[1][0][stream]["seeds"]
    flat = [seed for share in asked for seeds in share for seed in seeds]
    assert sorted(flat) == sorted(seed for seeds in alone for seed in seeds)
    assert len(set(flat)) == sum(BUDGETS)
    large = set(max(alone, key=len))
    assert all(any(large & set(seeds) for seeds in share) for share in asked)


def test_every_rank_returns_the_same_and_expects_the_same_length(by_size):
    for size in (2, 4):
        first, *others = by_size[size]
        for other in others:
            for one, two in zip(first, other, strict=True):
                assert one["expected"] == two["expected"]
                assert one["num_near_ties"] == two["num_near_ties"]
                for name in ("responses", "sampler_logprobs"):
                    assert all(map(torch.equal, one[name], two[name]))
