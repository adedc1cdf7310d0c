"""The real vLLM, in this process: one engine of a tied policy for all of these tests.

On a machine with CUDA it is the engine that runs there: in bfloat16, with CUDA graphs, under vLLM's
second model runner.
"""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2ForCausalLM

from rlzoo.callbacks import WeightSync
from rlzoo.engines import vllm as vllm_engine
from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.engines.vllm import VLLMEngine
from rlzoo.errors import UserError
from rlzoo.models.logprobs import response_scores
from rlzoo.report.ledger import Ledger
from rlzoo.types import Prompt, Rollouts, collate
from tests.conftest import make_tiny_model

pytestmark = pytest.mark.vllm
PARAMS = SamplingParams(temperature=0.9, max_response_tokens=24)
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (3, 4)]
EOS = 0
CUDA = torch.cuda.is_available()
GAP = (
    0.3  # nats, mean: rounding of bfloat16 on the policy of these tests; stale weights are far over
)
on_a_cpu = pytest.mark.skipif(CUDA, reason="of vLLM's CPU kernels, or equal to the bit there alone")


def make_policy(seed: int = 0) -> Qwen2ForCausalLM:
    """Tied, which is where vLLM's packed head may go stale."""
    return make_tiny_model(seed, tied=True, width=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    make_policy().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def process_before() -> dict:
    torch.manual_seed(5)
    return {
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "cores": os.sched_getaffinity(0),
        "variables": {k: v for k, v in os.environ.items() if not k.startswith(("VLLM", "PYTEST"))},
        "random": torch.get_rng_state(),
    }


@pytest.fixture(scope="module")
def started(folder, process_before, tmp_path_factory):
    """(engine, what it printed): started once."""
    log_file = tmp_path_factory.mktemp("logs") / "vllm.log"
    engine = VLLMEngine(
        str(folder),
        [EOS],
        max_prompt_tokens=32,
        max_response_tokens=32,
        kv_cache_gb=0.1,
        max_num_seqs=64,
        log_file=str(log_file),
    )
    engine.wake()
    yield engine
    engine.close()


@pytest.fixture
def engine(started) -> VLLMEngine:
    started.load_weights(make_policy(3).named_parameters(), version=5)
    return started


def requests(*sizes: int) -> list[Request]:
    return [
        Request(prompt, tuple(1000 * i + j for j in range(n)))
        for i, (prompt, n) in enumerate(zip(PROMPTS, sizes, strict=False))
    ]


def gaps(policy: Qwen2ForCausalLM, engine: VLLMEngine, version: int) -> torch.Tensor:
    """|trainer - engine| log-probs of every token of a ragged draw."""
    sizes = (3, 0, 5, 2)
    drawn = engine.generate(requests(*sizes), PARAMS, expected_version=version)
    assert [len(group) for group in drawn] == list(sizes)
    responses = [response for group in drawn for response in group]
    rollouts = Rollouts(
        prompts=[Prompt(str(i), "", "", token_ids=p) for i, p in enumerate(PROMPTS)],
        group_ids=torch.arange(4).repeat_interleave(torch.tensor(sizes)),
        responses=[r.token_ids for r in responses],
        sampler_logprobs=[r.logprobs for r in responses],
        truncated=torch.tensor([r.truncated for r in responses]),
        rewards=torch.zeros(10),
        verdicts=torch.zeros(10, dtype=torch.int8),
        policy_version=version,
        rollout_step=0,
    )
    batch = collate(rollouts.rows(), 1)
    scores = response_scores(policy, batch, PARAMS.temperature).logprobs
    return (scores - batch.sampler_logprobs)[batch.response_mask].abs().detach()


def agree(found: torch.Tensor) -> bool:
    """Whether gaps are those of rounding, in the dtype that the engine has on this machine."""
    return float(found.mean()) < GAP if CUDA else float(found.max()) < 1e-4


def test_starting_leaves_the_process_as_it_was(started, process_before):
    assert torch.get_num_threads() == process_before["threads"]
    assert torch.set_num_threads is process_before["set_num_threads"]
    for task in os.listdir("/proc/self/task"):
        assert os.sched_getaffinity(int(task)) == process_before["cores"]
    now = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM", "PYTEST"))}
    assert now == process_before["variables"]


def test_the_model_runner_is_that_of_the_device(started):
    assert started._llm.llm_engine.vllm_config.use_v2_model_runner == CUDA


def test_it_serves_with_the_threads_that_it_was_compiled_with(engine, monkeypatch):
    core, before, seen = engine._llm.llm_engine, torch.get_num_threads(), set()
    step = core.step
    monkeypatch.setattr(core, "step", lambda: [seen.add(torch.get_num_threads()), step()][1])
    monkeypatch.setattr(engine, "_threads", before + 2)
    engine.generate(requests(1, 2), PARAMS, 5)
    engine.score([[3, 4, 5]])
    assert seen == {before + 2} and torch.get_num_threads() == before


def test_the_log_says_how_much_the_cache_holds(started):
    words = r"vLLM's cache holds ([\d,]+) tokens, ([\d,]+) of the longest"
    tokens, longest = (
        int(n.replace(",", "")) for n in re.fullmatch(words, started.room()).groups()
    )
    assert tokens > 1000 and longest == tokens // 64


def test_banners_go_to_the_log_file(started):
    assert "non-default args" in started.log_file.read_text()


def test_log_probs_are_the_trainers_after_every_sync(engine):
    for version in range(6, 12):
        policy = make_policy(version)
        engine.load_weights(policy.named_parameters(), version)
        assert agree(gaps(policy, engine, version))


def test_a_response_has_its_own_seed_and_ends_with_its_end_token(engine):
    many = [Request(PROMPTS[0], tuple(range(40)))]
    first, again = (engine.generate(many, PARAMS, 5)[0] for _ in range(2))
    assert [r.token_ids.tolist() for r in first] == [r.token_ids.tolist() for r in again]
    assert len({tuple(r.token_ids.tolist()) for r in first}) > 30
    ended = [r for r in first if not r.truncated]
    assert ended and all(r.token_ids[-1] == EOS and EOS not in r.token_ids[:-1] for r in ended)
    assert all(len(r.token_ids) == 24 for r in first if r.truncated)
    assert all(len(r.token_ids) == len(r.logprobs) for r in first)


@on_a_cpu
def test_greedy_decoding_gives_the_same_tokens_as_transformers(engine):
    other = TransformersEngine(make_policy, [EOS], 1, device="cpu")
    other.load_weights(make_policy(3).named_parameters(), 5)
    greedy, wanted = SamplingParams(0.0, 24), requests(1, 1, 1, 1)
    pairs = zip(engine.generate(wanted, greedy, 5), other.generate(wanted, greedy, 5), strict=True)
    for (ours,), (theirs,) in pairs:
        assert theirs.near_ties or ours.token_ids.tolist() == theirs.token_ids.tolist()


def test_every_response_is_told_once_as_it_is_returned(engine):
    told = {}
    drawn = engine.generate(
        requests(3, 2, 0, 4), PARAMS, 5, lambda i, k, r: told.update({(i, k): r})
    )
    assert len(told) == 9 and list(told) != sorted(told)  # as they finish
    assert all(told[i, k] is r for i, group in enumerate(drawn) for k, r in enumerate(group))


def test_weights_of_another_version_are_refused(engine):
    with pytest.raises(RuntimeError, match="holds policy version 5, but version 6"):
        engine.generate(requests(1), PARAMS, expected_version=6)


def module_of(policy: Qwen2ForCausalLM) -> SimpleNamespace:
    return SimpleNamespace(
        policy=policy,
        device=torch.device("cpu"),
        named_weights=policy.named_parameters,
        trainer=SimpleNamespace(precision="32-true"),
    )


@on_a_cpu
def test_the_check_after_a_sync_passes_and_notices_a_stale_head(engine, monkeypatch):
    sync, run = WeightSync("always"), SimpleNamespace(engine=engine, ledger=Ledger())
    tokenizer = SimpleNamespace(bos_token_id=None)
    data = SimpleNamespace(train_prompts=(), params=SamplingParams(), tokenizer=tokenizer)
    sync.sync(run, data, module_of(make_policy(20)))
    monkeypatch.setattr(vllm_engine, "repack_tied_head", lambda model: None)
    with pytest.raises(RuntimeError, match="weights differ from the trainer's"):
        sync.sync(run, data, module_of(make_policy(21)))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda named: named[1:], "left out"),
        (lambda named: [("nobody.weight", named[0][1]), *named[1:]], "no parameter nobody.weight"),
        (lambda named: [(named[0][0], named[0][1][:-1]), *named[1:]], "has shape"),
    ],
)
def test_weights_of_another_model_are_named(started, spoil, words):
    with pytest.raises(RuntimeError, match=words):
        started.load_weights(spoil(list(make_policy().named_parameters())), 9)
    policy = make_policy(4)  # and a good sync mends it
    started.load_weights(policy.named_parameters(), 10)
    assert agree(gaps(policy, started, 10))


def test_sequences_longer_than_the_model_are_refused_before_the_start(folder):
    with pytest.raises(UserError, match="takes sequences of at most 256 tokens"):
        VLLMEngine(str(folder), [EOS], max_prompt_tokens=200, max_response_tokens=57)


def test_a_machine_without_vllm_is_told_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    log_file = str(tmp_path / "vllm.log")
    engine = VLLMEngine(
        str(folder), [EOS], max_prompt_tokens=8, max_response_tokens=8, log_file=log_file
    )
    with pytest.raises(UserError, match="engine=vllm needs vLLM"):
        engine.wake()
