"""What was set on the command line acts, is refused by name, or is said to do nothing here."""

import inspect
import logging

import lightning
import pytest

from rlzoo.errors import UserError
from rlzoo.launch.idle import REFUSED, WARNED, check_idle
from rlzoo.launch.schema import check_settings
from rlzoo.launch.trainer_keys import ACTS, FIXED
from tests import warm
from tests.test_values import compose

SFT = ("algo=sft", "limits.max_updates=10")
IDLE = {
    # overrides: the key that would do nothing
    ("limits.max_responses=64", *SFT): "limits.max_responses=64",
    ("limits.max_tokens=64", *SFT): "limits.max_tokens=64",
    ("engine=transformers", "engine.max_rows=8", *SFT): "engine.max_rows=8",
    ("reward.num_workers=4", *SFT): "reward.num_workers=4",
    ("sampler=gvm", "sampler.callback.pilots=3", *SFT): "sampler.callback.pilots=3",
    ("val_every=4", *SFT): "val_every=4",
    ("pipeline=one_step", *SFT): "pipeline=one_step",
    ("pipeline=one_step", "replay=elsewhere", "sampler=uniform"): "pipeline=one_step",
    ("doctor=true", *SFT): "doctor=true",
    ("val_every=4", "callbacks.validation=null"): "val_every=4",
    ("val_every=4", "~callbacks.validation"): "val_every=4",
    ("doctor=true", "callbacks.doctor=null"): "doctor=true",
    ("doctor=true", "replay=elsewhere", "sampler=uniform"): "doctor=true",
    ("resume=weights",): "resume=weights",
    ("lr=0.1", "algo.optimizer.lr=0.2"): "lr=0.1",
    ("critic_lr=0.1",): "critic_lr=0.1",
    ("data=jsonl", "data.path=a", "data.val_path=b", "data.val_fraction=0.1"): "data.val_fraction",
    (
        "data=jsonl",
        "data.path=a",
        "data.test_path=b",
        "data.test_fraction=0.1",
    ): "data.test_fraction",
    ("strategy=deepspeed_zero2", "strategy.persistence_threshold=10"): "strategy.persistence_thres",
    ("callbacks.checkpoint.monitor=null", "callbacks.checkpoint.keep_best=3"): "keep_best=3",
    ("callbacks.checkpoint.every_seconds=60.0",): "callbacks.checkpoint.every_seconds=60",
    ("sizes.val_every=4", *SFT): "sizes.val_every=4",
    ("sizes.max_solution_tokens=64",): "sizes.max_solution_tokens=64",
    ("sizes.responses_per_step=64", *SFT): "sizes.responses_per_step=64",
    (
        "sizes.responses_per_step=64",
        "datamodule.responses_per_step=16",
    ): "datamodule.responses_per_step is set itself",
    ("sizes.val_every=4", "val_every=2"): "sizes.val_every=4",
    ("sizes.checkpoint_every=4", "callbacks.checkpoint.every=2"): "sizes.checkpoint_every=4",
    ("sizes.max_responses=64", "limits.max_responses=32"): "sizes.max_responses=64",
    ("sizes.prompts_per_epoch=64", "datamodule.prompts_per_epoch=32"): "sizes.prompts_per_epoch",
    ("sizes.max_prompt_tokens=64", "datamodule.max_prompt_tokens=32"): "sizes.max_prompt_tokens",
    ("sizes.max_response_tokens=9", "datamodule.max_response_tokens=8"): "sizes.max_response_tok",
    ("sizes.on_too_long=drop", "datamodule.on_too_long=error"): "sizes.on_too_long=drop",
    ("engine=transformers", "callbacks.weight_sync.probe_tolerance=0.1"): "probe_tolerance=0.1",
    ("callbacks.weight_sync={check: never, probe_tolerance: 0.1}",): "probe_tolerance=0.1",
    ("engine=transformers", "engine.device=cpu", *SFT): "engine.device=cpu",
}
WARNINGS = {
    (
        "engine.vllm.max_num_seqs=8",
    ): "engine.vllm.max_num_seqs=8 does nothing: engine=auto takes tr",
    ("engine=vllm", "engine.sleep_level=1"): "engine.sleep_level=1 does nothing: there is no CUDA",
    ("engine=vllm", "engine.gpu_memory_share=0.5"): "engine.gpu_memory_share=0.5 does nothing",
    ("data.num_test=16",): "data.num_test=16 does nothing: training reads no test prompts",
    ("datamodule.val_responses=4", "~callbacks.validation"): "datamodule.val_responses=4 does noth",
}
ACTING = [
    ("limits.max_responses=null", *SFT),
    ("val_every=4", "resume=exact", "replay=null", "doctor=false", "pipeline=one_step"),
    ("pipeline=none", *SFT),
    ("lr=0.1", "critic_lr=0.1", "algo=ppo"),
    ("resume=weights", "ckpt_path=last"),
    ("data=jsonl", "data.path=a", "data.val_fraction=0.1", "data.val_path=null"),
    ("strategy=deepspeed_zero3", "strategy.persistence_threshold=10"),
    ("engine=vllm", "callbacks.weight_sync.probe_tolerance=0.1"),
    ("engine=auto", "engine.transformers.max_rows=8"),
    ("sizes.responses_per_step=64", "sizes.max_response_tokens=64", "sizes.checkpoint_every=2"),
    ("sizes.max_solution_tokens=64", "sizes.max_prompt_tokens=64", *SFT),
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize(("overrides", "words"), IDLE.items(), ids=str)
def test_a_setting_that_would_do_nothing_is_refused(overrides, words):
    with pytest.raises(UserError) as raised:
        check_idle(compose(*overrides), overrides)
    assert words in str(raised.value) and "would do nothing: " in str(raised.value)


@pytest.mark.parametrize(("overrides", "words"), WARNINGS.items(), ids=str)
def test_a_setting_that_does_nothing_on_this_machine_is_said(overrides, words, caplog):
    with caplog.at_level(logging.WARNING):
        check_idle(compose(*overrides), overrides)
    assert words in caplog.text


@pytest.mark.parametrize("overrides", ACTING, ids=" ".join)
def test_a_setting_that_acts_passes_unsaid(overrides, caplog):
    check_idle(compose(*overrides), overrides)
    assert caplog.text == ""


def test_settings_of_the_engine_that_auto_does_not_take_are_said(caplog, monkeypatch):
    monkeypatch.setattr("rlzoo.launch.idle.why_not_vllm", lambda: None)
    overrides = ["engine.transformers.max_rows=8", "engine.vllm.max_num_seqs=8"]
    check_idle(compose(*overrides), overrides)
    assert "engine.transformers.max_rows=8 does nothing: engine=auto takes vLLM here" in caplog.text
    assert "max_num_seqs" not in caplog.text


def test_every_rule_is_tried():
    """A rule that no case above meets might never fire."""
    tried = "engine.transformers." + " ".join(
        part for overrides in [*IDLE, *WARNINGS] for part in overrides
    )
    for rule in [*REFUSED, *WARNED]:
        assert any(key.rstrip("*") in tried for key in rule.keys.split()), rule.keys


def test_a_run_refuses_an_idle_setting_of_its_command_line(tmp_path):
    message = warm.refused(tmp_path / "run", "critic_lr=0.1")
    assert "critic_lr=0.1 would do nothing" in message


# --- Lightning's Trainer -------------------------------------------------------------------------


def test_every_argument_of_lightnings_trainer_has_its_place():
    known = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert known == ACTS.keys() | FIXED.keys(), "a new argument acts, or is refused, by name"
    assert not ACTS.keys() & FIXED.keys()


OTHER = {  # a value that Lightning takes and that is not the one that rlzoo has
    "min_epochs": 2,
    "max_steps": 3,
    "min_steps": 2,
    "max_time": "00:00:01:00",
    "fast_dev_run": True,
    "gradient_clip_algorithm": "value",
    "accumulate_grad_batches": 2,
    "limit_train_batches": 1,  # which is one batch, and equal to Python's 1.0
    "overfit_batches": 2,
    "limit_val_batches": 2,
    "limit_test_batches": 2,
    "limit_predict_batches": 2,
    "val_check_interval": 1,
    "check_val_every_n_epoch": 2,
    "num_sanity_val_steps": 2,
    "log_every_n_steps": 5,
    "enable_checkpointing": True,
    "enable_progress_bar": True,
    "use_distributed_sampler": True,
    "reload_dataloaders_every_n_epochs": 1,
    "inference_mode": False,
    "sync_batchnorm": True,
    "barebones": True,
    "enable_autolog_hparams": False,
    "default_root_dir": "elsewhere",
    "model_registry": "elsewhere",
    "logger": True,
    "callbacks": "[{_target_: lightning.Callback}]",
    "plugins": "[]",
    "strategy": "ddp",
}
NOT_SO = {  # values of arguments that act, which would do something else than they say
    "accelerator": ["tpu", "auto", "mps", "null"],
    "devices": ["auto", "-1", "[0,1]", "'2'", "0", "1.5"],
    "num_nodes": ["0", "true"],
    "max_epochs": ["0", "-2", "1.5", "null"],
    "precision": ["16-mixed", "16-true", "transformer-engine", "16", "fp8"],
    "gradient_clip_val": ["-1", "nan", "inf", "'1'"],
    "deterministic": ["maybe"],
    "benchmark": ["maybe"],
    "detect_anomaly": ["2"],
    "enable_model_summary": ["full"],
    "profiler": ["xla", "true"],
}


def test_every_argument_that_is_not_the_users_is_refused_with_what_to_use():
    assert OTHER.keys() == FIXED.keys()
    overrides = [f"++trainer.{name}={value}" for name, value in OTHER.items()]
    for override in overrides:
        with pytest.raises(UserError) as raised:
            check_settings(compose(override))
        key = override.removeprefix("++").partition("=")[0]
        assert str(raised.value).startswith(f"{key} must be "), override
        assert str(raised.value).endswith(f"{FIXED[key.partition('.')[2]][1]}."), override


def test_values_that_would_do_something_else_are_refused():
    assert NOT_SO.keys() == ACTS.keys()
    for name, values in NOT_SO.items():
        for value in values:
            with pytest.raises(UserError, match=rf"^trainer\.{name} must be "):
                check_settings(compose(f"++trainer.{name}={value}"))
