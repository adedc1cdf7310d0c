"""`pipeline=one_step`: the next rollout step is drawn while this one is trained on."""

from __future__ import annotations

import csv
import functools
import threading
from pathlib import Path

import pytest
import torch

from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.process import EngineProcess
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.models.policy import load_policy
from tests import warm

EPOCHS = (  # two epochs of three rollout steps
    "datamodule.prompts_per_epoch=12",
    "limits.max_responses=96",
)
GAP = "algo.max_logprob_gap=1e-3"  # less than the policy moves in a step
AHEAD = ("pipeline=one_step", "algo.tis_cap=2.0", "engine=transformers", GAP, *EPOCHS)


@pytest.fixture(scope="module")
def beside():
    """As if the engine had a process of its own: a thread of this one is as exact, and starts at
    once. Which threads drew, in order."""
    original, drew = TransformersEngine.generate, []

    def noted(self, *args, **kwargs):
        drew.append(threading.current_thread().name)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "beside", True, raising=False)
        patch.setattr(TransformersEngine, "generate", noted)
        yield drew


@pytest.fixture(scope="module")
def whole(beside, tmp_path_factory):
    """A run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    beside.clear()
    warm.passed(run_dir, *AHEAD)
    return run_dir


def rows(run_dir: Path) -> list[dict[str, str]]:
    found = list(csv.DictReader((run_dir / "metrics.csv").open()))
    return [row for row in found if row["num_rollouts"]]


def test_a_step_is_drawn_by_the_weights_that_the_one_before_began_with(tmp_path, whole, beside):
    in_turn = beside[1:-1]  # without the two validations
    assert [name == "rlzoo-ahead" for name in in_turn] == [False, True, True, False, True, True]
    beside.clear()
    warm.passed(tmp_path, "algo.tis_cap=2.0", "engine=transformers", *EPOCHS)
    assert "rlzoo-ahead" not in beside
    ahead, plain = rows(whole), rows(tmp_path)
    assert [int(row["lag/updates"]) for row in ahead] == [0, 2, 2, 0, 2, 2]
    assert [int(row["policy_version"]) for row in ahead] == [0, 0, 2, 6, 6, 8]
    assert [row["responses"] for row in ahead] == [row["responses"] for row in plain]
    for name in ("reward", "length/mean", "loss", "logprob_gap/mean"):
        assert ahead[0][name] == plain[0][name]  # the first step is on-policy
    assert float(ahead[1]["lag/logprob_gap/mean"]) > 1e-3 > float(ahead[3]["logprob_gap/mean"])
    assert not ahead[1]["logprob_gap/mean"] and "lag/updates" not in plain[0]
    assert [int(row["responses/ahead"]) for row in ahead] == [16, 16, 0, 16, 16, 0]


def test_a_run_that_is_stopped_and_goes_on_is_the_run_that_was_not(tmp_path, whole):
    warm.passed(tmp_path, *AHEAD, "limits.max_seconds=1e-3")  # the next step has been drawn
    (first,) = rows(tmp_path)
    assert (first["responses"], first["responses/ahead"]) == ("16", "16")
    in_turn = ("engine=transformers", *EPOCHS, "ckpt_path=last", "resume=weights")
    told = warm.refused(tmp_path, *in_turn)  # with pipeline=none, and nothing that weighs it
    assert "was drawn 2 updates ago" in told and "Set algo.tis_cap=2.0" in told
    warm.passed(tmp_path, *AHEAD, "ckpt_path=last")
    paths = [run_dir / "checkpoints" / "last.ckpt" for run_dir in (whole, tmp_path)]
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert [row["reward"] for row in rows(whole)] == [row["reward"] for row in rows(tmp_path)]


def test_nothing_is_drawn_that_a_limit_would_leave_untrained(tmp_path, beside):
    beside.clear()
    warm.passed(tmp_path, *AHEAD, "limits.max_updates=4")
    assert [row["responses/ahead"] for row in rows(tmp_path)] == ["16", "0"]
    assert beside.count("rlzoo-ahead") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (("engine=vllm",), "VLLMEngine draws in the trainer's own process, and cannot"),
        (("engine=transformers_process", "algo.tis_cap=null"), "Set algo.tis_cap=2.0"),
        (("engine=transformers_process", "sampler=dynamic"), "Take sampler=uniform"),
        (("engine=transformers_process", "datamodule.prompts_per_epoch=4"), "one rollout step"),
    ],
)
def test_what_cannot_draw_beside_training_is_refused(tmp_path, options, message):
    told = warm.refused(tmp_path, "pipeline=one_step", "algo.tis_cap=2.0", *options)
    assert "pipeline=one_step: " in told and message in told


def test_an_engine_in_a_process_of_its_own_draws_the_same(tmp_path):
    make = functools.partial(load_policy, "tiny")
    policy, ids = make(), ([2], 0)
    here, there = TransformersEngine(make, *ids), EngineProcess(make, *ids, num_threads=1)
    requests = [Request((5, 6, 7, 8), (1, 2, 3)), Request((9, 6), (4,))]
    try:
        for version in range(2):
            drawn, told = [], []
            for engine in (here, there):
                engine.wake()
                engine.load_weights(policy.named_parameters(), version)
                told.append([])
                tell = lambda i, j, _, into=told[-1]: into.append((i, j))  # noqa: E731
                drawn.append(engine.generate(requests, SamplingParams(1.0, 8), version, tell))
            assert here.checksum() == there.checksum() and told[0] == told[1]
            for ours, theirs in zip(sum(drawn[0], []), sum(drawn[1], []), strict=True):
                assert torch.equal(ours.token_ids, theirs.token_ids)
                assert torch.equal(ours.logprobs, theirs.logprobs)
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.05)
        with pytest.raises(RuntimeError, match="The engine's process failed"):
            there.generate([Request((10**9,), (1,))], SamplingParams(1.0, 8), 1)
        there._process.kill()
        with pytest.raises(RuntimeError, match="process has ended"):
            there.generate(requests, SamplingParams(1.0, 8), 1)
    finally:
        there.close()
