"""Values that are none, and settings that nothing takes, are refused before anything is built."""

import contextlib
import copy
import functools
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlzoo.launch.configuration import check_overrides, conf_dir
from rlzoo.launch.schema import check_settings
from rlzoo.launch.training import build
from rlzoo.report.progress import Bars
from rlzoo.run import explain
from tests import warm


@functools.cache
def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose("train", overrides=["run_dir=unused", *overrides])


def compose(*overrides: str) -> DictConfig:
    """As Hydra does it, but the choices of groups once for all cases that have the same."""
    groups = [text for text in overrides if text.partition("=")[0] in GROUPS]
    cfg = copy.deepcopy(composed(*groups))
    for text in overrides:
        if text not in groups and not assigned(cfg, text):
            return copy.deepcopy(composed(*overrides))
    return cfg


GROUPS = {path.name for path in conf_dir().iterdir() if path.is_dir()}
ABSENT = object()


def assigned(cfg: DictConfig, text: str) -> bool:
    """Sets a value that is there, or is added with +; False for what Hydra has to look at."""
    override = OverridesParser.create().parse_override(text)
    key, adds = override.key_or_group, override.is_add() or override.is_force_add()
    try:
        there = OmegaConf.select(cfg, key, default=ABSENT, throw_on_missing=False) is not ABSENT
    except OmegaConfBaseException:
        return False
    if override.is_delete() or override.is_sweep_override() or there == override.is_add():
        return False
    OmegaConf.update(cfg, key, override.value(), force_add=adds)
    return True


def refusal(*overrides: str) -> str:
    """What a run says of these overrides before anything is built; a stack trace is none."""
    cfg = None
    try:
        try:
            cfg = compose(*overrides)
        except Exception:
            check_overrides(overrides)
            raise
        loop, _ = build(cfg, Bars(enabled=False))
    except Exception as error:
        message = explain(error, cfg)
        assert message is not None, f"not explained: {error!r}"
        return " ".join(message.split())
    with contextlib.suppress(AttributeError):
        loop.run.close()
    raise AssertionError(f"{overrides} were accepted")


SERVER = "engine=vllm_server engine.addresses=[http://localhost:8000]"
FILE = "data=jsonl data.path=rows.jsonl"
NO_VALUES = {
    # overrides: what the message says
    "datamodule.temperature=nan": "datamodule.temperature must be a number, above 0, got nan",
    "datamodule.temperature=inf": "datamodule.temperature must be a number, above 0, got inf",
    "datamodule.temperature=0": "datamodule.temperature must be a number, above 0, got 0",
    "seed=abc": "seed must be a whole number, at least 0, below 4,294,967,296, got 'abc'",
    "seed=1.5": "seed must be a whole number, at least 0",
    "seed=1180591620717411303424": "below 4,294,967,296",
    "seed=null": "got null",
    "seed='1 2'": "seed must be a whole number",
    "seed={a:1}": "seed must be a whole number",
    "lr=-1": "lr must be a number, at least 0, got -1",
    "lr=inf": "lr must be a number, at least 0, got inf",
    "lr='1e-6'": "Write 1e-06, without quotes",
    "algo.optimizer.lr=nan": "algo.optimizer.lr must be a number",
    "val_every=2.5": "val_every must be a whole number, at least 0, or 'auto', got 2.5",
    "algo.updates=1.5": "algo.updates must be a whole number, at least 1, got 1.5",
    "algo.updates=true": "algo.updates must be a whole number, at least 1, got true",
    "algo.clip_low=nan": "algo.clip_low must be a number, above 0, below 1, or null, got nan",
    "algo.max_logprob_gap=nan": "algo.max_logprob_gap must be a number, above 0",
    "algo.max_skipped_updates=-1": "algo.max_skipped_updates must be a whole number, at least 0",
    "algo.scheduler.num_warmup_steps=-1": "algo.scheduler.num_warmup_steps must be a whole number",
    "algo=sft": "limits.max_updates must be a whole number",
    "limits.max_responses=many": "limits.max_responses must be a whole number, at least 1, or null",
    "limits.max_responses=1e3": "Write 1000",
    "limits.max_seconds=nan": "limits.max_seconds must be a number, above 0",
    "limits.max_tokens=0": "limits.max_tokens must be a whole number, at least 1, or null, got 0",
    "datamodule.prompts_per_epoch=0": "datamodule.prompts_per_epoch must be a whole number, at",
    "datamodule.responses_per_prompt=0": "datamodule.responses_per_prompt must be a whole number",
    "datamodule.responses_per_step=0": "datamodule.responses_per_step must be a whole number, at",
    "datamodule.max_prompt_tokens=0": "datamodule.max_prompt_tokens must be a whole number, at l",
    "datamodule.max_response_tokens=0": "datamodule.max_response_tokens must be a whole number",
    "datamodule.val_responses=0": "datamodule.val_responses must be a whole number, at least 1",
    "datamodule.on_overlap=keep": "datamodule.on_overlap must be one of 'warn', 'drop', 'error'",
    "datamodule.on_too_long=cut": "datamodule.on_too_long must be one of 'error', 'drop', got 'c",
    "datamodule.top_p=0": "datamodule.top_p must be a number, above 0, at most 1, got 0",
    "datamodule.top_k=-1": "datamodule.top_k must be a whole number, at least 0, got -1",
    "algo=sft datamodule=sft datamodule.batch_size=0": "datamodule.batch_size must be a whole",
    "algo=sft datamodule=sft datamodule.updates_per_step=0": "datamodule.updates_per_step must be",
    "model.dtype=int8": "model.dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'",
    "num_threads=two": "num_threads must be a whole number, at least 1",
    "num_threads=100000": "at most 4,096",
    "debug=maybe": "debug must be true or false, got 'maybe'",
    "doctor=yes": "Write true, without quotes",
    "resume=fresh": "resume must be one of 'exact', 'weights', got 'fresh'",
    "trainer.devices='2'": "trainer.devices must be a whole number",
    "trainer.gradient_clip_val=nan": "trainer.gradient_clip_val must be a number",
    "engine=transformers engine.max_rows=1e3": "engine.max_rows must be a whole number",
    "engine=transformers engine.device=banana": "engine.device",
    "engine.transformers.max_rows=0": "engine.transformers.max_rows must be a whole number",
    "engine=vllm engine.sleep_level=3": "engine.sleep_level must be one of 0, 1, 2, got 3",
    "engine=vllm engine.gpu_memory_share=1.5": "engine.gpu_memory_share must be a number, above",
    "engine=vllm engine.gpu_memory_share=nan": "engine.gpu_memory_share must be a number, above",
    "engine=vllm engine.kv_cache_gb=nan": "engine.kv_cache_gb must be a number, above 0, or null",
    "engine=vllm engine.kv_cache_gb=0": "engine.kv_cache_gb must be a number, above 0, or null",
    "engine=vllm engine.dtype=int8": "engine.dtype must be one of 'auto', 'float32', 'bfloat16'",
    "engine=vllm engine.max_num_seqs=0": "engine.max_num_seqs must be a whole number, at least 1",
    "engine=vllm engine.tensor_parallel=0": "engine.tensor_parallel must be a whole number, at l",
    "engine=vllm_server": "engine.addresses must be a list, each text, not empty, got []. Such as",
    f"{SERVER} engine.transfer=rdma": "engine.transfer must be one of 'auto', 'folder', 'nccl'",
    f"{SERVER} engine.concurrency=0": "engine.concurrency must be a whole number, at least 1",
    f"{SERVER} engine.timeout=0": "engine.timeout must be a number, above 0, got 0",
    "engine=vllm engine.log_file=5": "engine.log_file must be text",
    "data.families=sums": "Write [sums]",
    "data.levels=[1,2.5]": "data.levels must be a list, each one of 1, 2, 3, 4, 5, got [1, 2.5]",
    "data.families=[sums,powers]": "data.families must be a list, each one of 'sums', 'products'",
    "data.levels=[1,6]": "data.levels must be a list, each one of 1, 2, 3, 4, 5, got [1, 6]",
    "data.num_val=0": "data.num_val must be a whole number, at least 1, got 0",
    **{
        f"{FILE} {key}": words
        for key, words in {
            "data.file_format=xml": "data.file_format must be one of 'auto', 'jsonl', 'parquet'",
            "data.answer_format=box": "data.answer_format must be one of 'plain', 'boxed'",
            "data.on_bad_row=ignore": "data.on_bad_row must be one of 'error', 'skip'",
            "data.val_fraction=1": "data.val_fraction must be a number, at least 0, below 1, got 1",
            "data.test_fraction=-0.1": "data.test_fraction must be a number, at least 0, below 1",
            "data.max_prompts=0": "data.max_prompts must be a whole number, at least 1, or null",
        }.items()
    },
    "data.template=bare": "data.template must be a mapping with a _target_",
    "data.template.user_suffix=3": "data.template.user_suffix must be text, got 3",
    "algo.optimizer.betas=[0.9]": "algo.optimizer.betas must be a list of 2",
    "algo.optimizer.betas=[0.9,1.5]": "below 1",
    "callbacks.checkpoint.every=no": "callbacks.checkpoint.every must be a whole number",
    "callbacks.checkpoint=often": "callbacks.checkpoint must be a mapping with a _target_",
    "callbacks.weight_sync.probe_tolerance=-1": "callbacks.weight_sync.probe_tolerance",
    "callbacks.rank_watch.patience=nan": "callbacks.rank_watch.patience must be a number",
    "model.gradient_checkpointing='yes please'": "model.gradient_checkpointing must be true or f",
    "model.path=5": "model.path must be text",
    "sampler=gvm sampler.callback.pilots=0": "sampler.callback.pilots must be a whole number",
    "sampler=dynamic sampler.allocator.max_rounds=0": "sampler.allocator.max_rounds must be a who",
    "sampler=gvm sampler.allocator.beta=1.5": "beta must be a number, at least 2, got 1.5. See arX",
    "sampler=gvm sampler.allocator.n_min=-1": "sampler.allocator.n_min must be a whole number, at",
    "sampler=gvm sampler.allocator.n_max=0": "sampler.allocator.n_max must be a whole number, at",
    "sampler=gvm sampler.allocator.n_min=3 sampler.allocator.n_max=2": "at least n_min=3, got 2.",
    "sampler=gvm sampler.allocator.alpha=inf": "sampler.allocator.alpha must be a number, above 0",
    "strategy=ddp strategy.timeout=-1": "strategy.timeout must be a number, above 0, got -1",
    "strategy=deepspeed_zero2 strategy.stage=4": "strategy.stage must be one of 1, 2, 3, got 4",
    "reward.num_workers=1.5": "reward.num_workers must be a whole number",
    "reward.num_workers=0": "reward.num_workers must be a whole number, at least 1, or 'auto', ",
    "reward.seconds_per_answer=0.0": "reward.seconds_per_answer must be a number, at least 0.01",
    "reward.seconds_per_answer=nan": "reward.seconds_per_answer must be a number, at least 0.01",
    "reward.memory_mb=1": "reward.memory_mb must be a whole number, at least 16, got 1",
    "reward.max_answer_chars=-1": "reward.max_answer_chars must be a whole number, at least 1",
    "reward.recycle_after=0": "reward.recycle_after must be a whole number, at least 1, got 0",
    "reward.truncated_is_wrong=1": "reward.truncated_is_wrong must be true or false",
    "init_from=''": "init_from must be text, not empty, or null",
    "run_dir=": "run_dir must be text, not empty",
    "run_dir=5": "run_dir must be text, not empty, got 5",
    "trainer.precision=32.0": "got 32.0. Write 32.",
    "engine=vllm engine.sleep_level=true": "engine.sleep_level must be one of 0, 1, 2, got true",
}


@pytest.mark.parametrize(("overrides", "words"), NO_VALUES.items(), ids=NO_VALUES)
def test_a_value_that_is_none_is_refused_with_key_value_and_mend(overrides, words):
    assert words in refusal(*split(overrides))


def split(overrides: str) -> list[str]:
    """At spaces that are not inside quotes."""
    parts = overrides.split(" ")
    return [overrides] if "'" in overrides and overrides.count("=") == 1 else parts


MISFITS = {
    "+engine._partial_=true": "engine._partial_ must be left out",
    "+callbacks.export._partial_=true": "callbacks.export._partial_ must be left out",
    "+algo._recursive_=false": "algo._recursive_ must be left out",
    "~model._partial_": "model._partial_ must be true",
    "callbacks.checkpoint.run_dir=elsewhere": "callbacks.checkpoint.run_dir must follow run_dir",
    "logger.csv.run_dir=elsewhere": "logger.csv.run_dir must follow run_dir",
    "+foo=1": "foo is no setting that anything reads",
    "+sed=1": "Did you mean seed?",
    "+limits.max_response=1": "Did you mean limits.max_responses?",
    "+algo.clip_lo=0.1": "algo.clip_lo is nothing that GRPO takes. Did you mean algo.clip_low",
    "+callbacks.foo=3": "callbacks.foo must be a mapping with a _target_, got 3",
    "+sampler.foo=3": "sampler.foo is no part of a sampler",
    "~data": "data",
    "~val_every": "val_every is missing",
    "~trainer.devices": "trainer.devices is missing",
    "~trainer.strategy": "trainer.strategy is missing",
    "~trainer.limit_val_batches": "trainer.limit_val_batches is missing",
    "trainer._target_=pytorch_lightning.Trainer": "trainer._target_=pytorch_lightning.Trainer",
    "model=hf": "model.path must be given: model.path=VALUE",
    "algo.optimizer._target_=torch.optim.SGDD": "algo.optimizer._target_=torch.optim.SGDD",
    "algo.optimizer._target_=torch.optim.SGD": "algo.optimizer.betas is nothing that SGD takes",
    "algo.optimizer=adam": "algo.optimizer must be a mapping with a _target_",
    "algo.optimizer._partial_=false": "algo.optimizer needs _partial_: true",
    "~algo.scheduler.num_warmup_steps": "algo.scheduler cannot be built",
    "algo.scheduler._target_=transformers.get_linear_schedule_with_warmup": "num_training_steps",
    "val_every='${datamodule.nothing}'": "val_every=${datamodule.nothing} cannot be resolved",
    "logger=null": "logger",
}


@pytest.mark.parametrize(("override", "words"), MISFITS.items(), ids=MISFITS)
def test_a_setting_that_nothing_takes_is_refused_with_its_key(override, words):
    assert words in refusal(override)


@pytest.mark.parametrize(
    "overrides",
    [
        ["datamodule.temperature=1", "val_every=0", "limits=null"],
        ["~limits", "algo.scheduler=null"],
        ["algo.optimizer._target_=torch.optim.SGD", "~algo.optimizer.betas"],
        ["+mine=0.5", "datamodule.temperature='${mine}'"],
        ["logger=none", "callbacks.validation=null", "~callbacks.rank_watch"],
        ["+callbacks.mine={_target_: tests.test_values.Mine, anything: [1, x]}"],
    ],
)
def test_what_is_meant_so_passes(overrides):
    check_settings(compose(*overrides))


class Mine:
    """Of a user, without annotations."""

    def __init__(self, anything=None, *rest, **more):
        self.anything = anything


def test_a_run_tells_all_problems_at_once_and_touches_nothing(tmp_path: Path):
    wrong = ("seed=abc", "debug=maybe", "+foo=1", "~trainer.accelerator", "trainer.devices=null")
    message = warm.refused(tmp_path / "run", *wrong)
    for key in ("seed", "debug", "foo", "trainer.accelerator", "trainer.devices"):
        assert f"{key} " in message
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_leading_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch):
    """The ones that a command line sets; those of nodes follow from their signatures."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ["run_dir", "init_from", "replay", "model.path"]
    cfg = compose(*(f"++{key}='~/{key}'" for key in keys), "engine=vllm", "engine.log_file='~/v'")
    check_settings(cfg)
    assert [OmegaConf.select(cfg, key) for key in keys] == [f"{tmp_path}/{key}" for key in keys]
    assert cfg.engine.log_file == f"{tmp_path}/v"
    assert cfg.datamodule.replay == cfg.replay and cfg.engine.path == cfg.model.path
    assert cfg.data.template.user_suffix == ""


def test_a_run_directory_under_the_home_folder_is_made_there(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    warm.passed(Path("~/there"), "limits.max_responses=16", "val_every=0")
    assert (tmp_path / "there" / "policy").is_dir()
    assert not (tmp_path / "~").exists()
