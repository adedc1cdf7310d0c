"""What stops a run whose engine or numbers are not what they should be, as a user meets it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from rlzoo.allocators.gvm import GVMBudgets
from rlzoo.callbacks import Checkpoint, WeightSync
from rlzoo.callbacks.broken import refuse_broken
from rlzoo.callbacks.checkpoint import comparable
from rlzoo.diagnosis.gap import GapWatch
from rlzoo.diagnosis.probe import LENGTH, probe_sequences
from rlzoo.engines.base import Response, SamplingParams
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.errors import UserError
from rlzoo.learning.metrics import PassMetrics
from rlzoo.report.ledger import Ledger
from rlzoo.types import Prompt
from tests import warm
from tests.conftest import make_tiny_model

ONE_STEP = ("limits.max_responses=16", "data.num_val=1", "datamodule.val_responses=1")


# --- the whole run ------------------------------------------------------------------------------


def test_a_trainer_in_bfloat16_beside_an_engine_in_float32_is_told_so(tmp_path):
    engine = ("engine=transformers", "engine.precision=32-true")
    options = ("trainer.precision=bf16-mixed", *engine, "doctor=true")
    told = warm.passed(tmp_path / "run", *ONE_STEP, *options)
    assert (
        "Likely cause: precision: the trainer computes in bfloat16, the engine in float32" in told
    )
    assert "sampling settings" not in told


def test_weights_that_an_update_makes_nan_stop_the_run_at_the_boundary(tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def spoiling(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0][3, 3] = math.nan
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    told = warm.refused(tmp_path / "run", *ONE_STEP)
    assert re.search(r"After update \d policy.model.embed_tokens.weight holds NaN or inf", told)
    assert "model.dtype=float32" in told
    assert not (tmp_path / "run" / "policy").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_an_engine_whose_log_probs_are_nan_stops_the_run_before_anything_is_made_of_it(
    tmp_path, monkeypatch
):
    changed(monkeypatch, from_call=1, change=lambda logprobs: logprobs * math.nan)
    told = warm.refused(tmp_path / "run", *ONE_STEP)
    assert "The engine's log-probs are not finite" in told and "engine.dtype" in told


@pytest.mark.parametrize("updates", [1, 2])  # with one, old log-probs come from the training pass
def test_a_gap_that_opens_later_stops_the_run(tmp_path, monkeypatch, updates):
    # Calls: validation, first step, second step.
    changed(monkeypatch, from_call=3, change=lambda logprobs: logprobs - 0.5)
    two = ("data.num_val=1", "datamodule.val_responses=1", f"algo.updates={updates}")
    told = warm.refused(tmp_path / "run", *two)
    assert "differ from the trainer's by 0.5 nats a token on average" in told
    assert "In the first rollout step it was" in told and "weight sync" in told
    assert len(list((tmp_path / "run").glob("checkpoints/step_*1.ckpt"))) == 1  # of the first step


def test_an_engine_that_loses_its_weights_in_its_sleep_is_found_out(tmp_path, monkeypatch):
    load, loads = TransformersEngine.load_weights, []

    def forgetting(self, named, version):
        loads.append(version)
        load(self, named, version)
        if len(loads) > 1:  # after the first sleep
            with torch.no_grad():
                next(self.model.parameters()).add_(1e-3)

    monkeypatch.setattr(TransformersEngine, "load_weights", forgetting)
    outcome = warm.run(tmp_path / "run", *ONE_STEP)
    assert outcome.code == 2 and len(loads) == 2
    assert "After a weight sync the engine's weights differ" in outcome.output


def changed(monkeypatch: pytest.MonkeyPatch, from_call: int, change) -> None:
    """From some call of `generate` on, the engine reports other log-probs."""
    original, calls = TransformersEngine.generate, []

    def spoilt(self, *args, **kwargs):
        calls.append(1)
        drawn = original(self, *args, **kwargs)
        if len(calls) < from_call:
            return drawn
        spoil = lambda r: Response(r.token_ids, change(r.logprobs), *r[2:])  # noqa: E731
        return [[spoil(response) for response in group] for group in drawn]

    monkeypatch.setattr(TransformersEngine, "generate", spoilt)


# --- weight sync --------------------------------------------------------------------------------


class CountingEngine:
    """An engine that cannot be read back, and counts what is asked of it."""

    dtype, kv_cache_dtype = "float32", "auto"

    def __init__(self) -> None:
        self.model = make_tiny_model()
        self.scored = 0
        self.off = 0.0  # nats that its log-probs are off by

    def wake(self) -> None: ...

    def checksum(self) -> None: ...

    def load_weights(self, named, version) -> None:
        self.model.load_state_dict(dict(named), strict=False)

    def score(self, sequences):
        from rlzoo.models.logprobs import sequence_logprobs

        self.scored += 1
        return [s + self.off for s in sequence_logprobs(self.model, sequences, torch.device("cpu"))]


def synced(check: str, times: int, engine: CountingEngine, policy=None) -> int:
    """How often a probe was asked for in so many syncs."""
    policy = policy or make_tiny_model(1)
    prompts = [Prompt(str(i), "", "", token_ids=(9, 9, 9, 2 + i, 3, 4, 5 + i)) for i in range(4)]
    run = SimpleNamespace(engine=engine, ledger=Ledger())
    tokenizer = SimpleNamespace(bos_token_id=None)
    data = SimpleNamespace(train_prompts=prompts, params=SamplingParams(), tokenizer=tokenizer)
    module = SimpleNamespace(
        policy=policy,
        device=torch.device("cpu"),
        named_weights=policy.named_parameters,
        trainer=SimpleNamespace(precision="32-true", precision_plugin=Precision()),
    )
    sync = WeightSync(check)
    for _ in range(times):
        sync.sync(run, data, module)
    return engine.scored


@pytest.mark.parametrize(("check", "times"), [("first", 2), ("always", 4), ("never", 0)])
def test_first_means_the_start_and_the_first_sync_after_a_sleep(check, times):
    assert synced(check, 4, CountingEngine()) == times


def test_stale_weights_fail_the_probe_and_broken_numbers_do_too():
    engine = CountingEngine()
    engine.off = 0.01
    with pytest.raises(RuntimeError, match="engine's weights differ from the trainer's.*0.01 nats"):
        synced("first", 1, engine)
    engine.off = math.nan
    with pytest.raises(RuntimeError, match="Log-probs of a probe are not finite"):
        synced("first", 1, engine)


def test_dropout_fails_the_probe_under_its_own_name():
    policy = make_tiny_model(1).train()
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.3
    with pytest.raises(RuntimeError) as found:
        synced("first", 1, CountingEngine(), policy)
    assert "Likely cause: dropout" in str(found.value)
    assert "weights differ" not in str(found.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_named(value):
    policy = make_tiny_model(1)
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight[2, 3] = value
    with pytest.raises(UserError, match=r"not finite: model.layers.1.mlp.up_proj.weight hold NaN"):
        refuse_broken(policy)


def test_the_probe_takes_prompts_from_where_they_begin_to_differ():
    head = (7, 7, 7, 7)
    prompts = [Prompt(str(i), "", "", token_ids=(*head, i, *range(40))) for i in range(20)]
    found = probe_sequences(make_tiny_model(), prompts)
    assert found[3] == [7, 3, *range(LENGTH - 2)] and len(found) == 8
    assert probe_sequences(make_tiny_model(), prompts[:1]) == [[*head, 0, *range(LENGTH - 5)]]
    assert len(probe_sequences(make_tiny_model())[0]) == LENGTH  # without prompts, of any tokens
    alike = [Prompt(str(i), "", "", token_ids=head) for i in range(3)]
    assert len(probe_sequences(make_tiny_model(), alike)[0]) == LENGTH


# --- when a gap is too much ---------------------------------------------------------------------


def watch(gap: float, first: float | None = None, of: str = "gap") -> GapWatch:
    """Of ten tokens, one of them not finite if `of` is a side."""
    found = GapWatch(limit=0.1)
    found.first = first
    ours, theirs = torch.zeros(10), torch.full((10,), gap)
    if of != "gap":
        (ours if of == "trainer" else theirs)[4] = math.nan
    found.note(ours, theirs)
    return found


@pytest.mark.parametrize(
    ("gap", "first", "of", "stops"),
    [
        (0.09, None, "gap", False),
        (0.2, 0.01, "gap", True),  # over the limit and 20 times the first
        (0.09, 0.001, "gap", False),  # below the limit
        (0.2, 0.08, "gap", False),  # over the limit, not 5 times the first
        (0.2, None, "gap", False),  # resumed from before the first gap was kept
        (math.nan, 0.01, "gap", True),  # of the engine
        (0.0, 0.01, "engine", True),
        (0.0, 0.01, "trainer", False),  # its updates are skipped, and counted
        (0.2, 0.01, "trainer", True),  # what is finite is too far
    ],
)
def test_a_later_step_is_held_to_the_limit_and_to_the_first(gap, first, of, stops):
    assert (watch(gap, first, of).too_far(first=False) is not None) == stops


@pytest.mark.parametrize("of", ["engine", "trainer"])
def test_a_log_prob_that_is_no_number_is_too_far_at_first(of):
    found = watch(0.0, of=of)
    assert found.too_far(first=True) is not None
    assert found.figures()["logprob_gap/not_finite"] == 1
    assert watch(0.0).too_far(first=True) is None


def test_the_first_gap_is_what_later_ones_are_measured_by():
    found = watch(0.09)
    assert found.too_far(first=True) is None and found.first == pytest.approx(0.09)
    found.begin()
    assert found.figures() == {}


# --- NaN passes no comparison -------------------------------------------------------------------


def test_no_budget_follows_from_norms_that_are_no_numbers():
    rates = np.array([0.5, 0.5, 0.5])
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match="sampler=gvm.* of 1 of 3 prompts.*model.dtype=float32"):
            GVMBudgets().budgets(rates, np.array([1.0, value, 2.0]), 12)
    assert sum(GVMBudgets().budgets(rates, np.array([1.0, 1.0, 2.0]), 12)) == 12


def test_a_score_that_is_no_number_is_never_the_best(tmp_path: Path):
    checkpoint = Checkpoint(str(tmp_path))
    assert not checkpoint.ranked(math.nan, "step_1")
    assert checkpoint.ranked(0.2, "step_2")
    assert not checkpoint.ranked(math.nan, "step_3")
    assert [name for _, name in checkpoint.best] == ["step_2"]


def test_a_monitor_that_the_first_step_does_not_have_is_said_and_a_changed_one_starts_anew(
    tmp_path, caplog
):
    checkpoint = Checkpoint(str(tmp_path), monitor="acept_rate")
    checkpoint.check_monitor(SimpleNamespace(last_row={}))  # no validation
    checkpoint.warn_of_monitor({"accept_rate": 0.5})
    assert "monitor=acept_rate is not among the columns" in caplog.text
    checkpoint = Checkpoint(str(tmp_path), monitor="val/avg_at_4")
    checkpoint.check_monitor(SimpleNamespace(last_row={"val/avg_at_4": 0.5}))
    caplog.clear()
    checkpoint.warn_of_monitor({"accept_rate": 0.5})  # validated before, and again later
    assert not caplog.text
    assert comparable("val/avg_at_8", "val/avg_at_4") and not comparable("reward", "val/avg_at_4")


def test_rewards_that_are_no_numbers_have_no_pass_rate():
    with pytest.raises(UserError, match="Rewards are not finite"):
        PassMetrics().update(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
