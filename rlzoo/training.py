"""A run from its configuration: claim the directory, build the parts, fit, sum up."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Callback
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig

from rlzoo.callbacks.checkpoint import asynchronous_io
from rlzoo.callbacks.doctor import Diagnosed
from rlzoo.callbacks.restore import Restore
from rlzoo.checkpoints import kind_of, saved_by, whole_weights
from rlzoo.engines.shapes import empty_model, expected_shapes
from rlzoo.errors import UserError, check_choice
from rlzoo.idle import check_idle
from rlzoo.ledger import Limits
from rlzoo.models.lora import check_lora, lora_settings
from rlzoo.models.policy import eos_token_ids, load_tokenizer, model_directory
from rlzoo.preflight import check_parts
from rlzoo.progress import Bars
from rlzoo.ranks import cluster_plugins, is_first, log_name
from rlzoo.rewards.calling import make_reward
from rlzoo.run_dir import claim, describe, find_checkpoint
from rlzoo.schema import check_settings
from rlzoo.summary import summarize

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    """Trains as the configuration says; what is left behind explains itself.

    Raises:
        UserError: anything the user can mend.
        Preempted: the run was told to stop, and has saved.
    """
    check_settings(cfg)
    run_dir = Path(cfg.run_dir)
    lock = claim(run_dir, resuming=cfg.ckpt_path is not None) if is_first() else None
    run_dir.mkdir(parents=True, exist_ok=True)
    quieten(run_dir)
    check_idle(cfg)
    set_up_process(cfg)
    checkpoint, state = find_checkpoint(cfg.ckpt_path, run_dir)
    exact = check_resume(cfg, checkpoint, state)
    bars = Bars(enabled=is_first())
    parts = build(cfg, bars)
    if state is not None and not exact:
        parts["algo"].restored_weights = partial(whole_weights, checkpoint)
        parts["callbacks"].insert(0, Restore(state))
    trainer = build_trainer(cfg, parts["callbacks"], purge_step(state))
    del state  # mapped from a file, which would keep its room on the disk once it is removed
    if is_first():
        describe(run_dir, cfg)
    data = parts["datamodule"]
    try:
        data.ledger.start()
        path = checkpoint if exact else None
        trainer.fit(parts["algo"], datamodule=data, ckpt_path=path, weights_only=True)
    except Diagnosed:
        bars.print_line("doctor=true: nothing was trained.")
        return
    finally:
        data.teardown("fit")
    if is_first():
        for line in summarize(run_dir, cfg, data):
            bars.print_line(line)
        lock.close()


def check_resume(cfg: DictConfig, checkpoint: Path | None, state: dict[str, Any] | None) -> bool:
    """Whether the run goes on exactly where the checkpoint is, optimizer included.

    Raises:
        UserError: it cannot, and `resume=weights` was not asked for; or another model saved it.
    """
    check_choice("resume", cfg.resume, ("exact", "weights"))
    if checkpoint is None:
        return True
    saved = saved_by(state)
    config = AutoConfig.from_pretrained(
        model_directory(cfg.model.path), trust_remote_code=cfg.model.trust_remote_code
    )
    count = sum(shape.numel() for shape in expected_shapes(config).values())
    if not saved["model"].endswith(f" of {count:,} parameters"):
        raise UserError(
            f"The checkpoint {checkpoint} is of {saved['model']}, but model.path={cfg.model.path}"
            f" has {count:,}. Resume with the model it was saved from, or start a new run_dir."
        )
    check_same_lora(cfg, checkpoint, state.get("lora"))
    if cfg.resume == "weights":
        return False
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    kind = strategy_kind(cfg)
    if kind == kind_of(checkpoint) != "deepspeed":
        return True
    if kind == "deepspeed" and saved["strategy"] == f"DeepSpeed stage {cfg.strategy.stage}":
        if saved["ranks"] == ranks:
            return True
    name = cfg.strategy._target_.rpartition(".")[2]
    raise UserError(
        f"The checkpoint {checkpoint} was saved by {saved['ranks']} process(es) under"
        f" {saved['strategy']}; this run has {ranks} under {name}, which cannot read its optimizer"
        " state. Resume as it was saved, or add resume=weights: weights, data, counts and outputs go"
        " on from there, the optimizer starts anew."
    )


def check_same_lora(cfg: DictConfig, checkpoint: Path, saved: dict[str, Any] | None) -> None:
    """Raises a UserError if the run's adapters are not those that a checkpoint holds."""
    lora = None if cfg.model.get("lora") is None else lora_settings(cfg.model.lora)
    told_apart = [x and [x["r"], x["alpha"], x["target_modules"]] for x in (lora, saved)]
    if told_apart[0] != told_apart[1]:
        raise UserError(
            f"The checkpoint {checkpoint} was saved under model.lora={saved}, this run has {lora}."
            " Resume with what it was saved under; to begin anew from its weights, start a new"
            " run_dir with init_from=CHECKPOINT."
        )


def strategy_kind(cfg: DictConfig) -> str:
    """What a strategy saves: "deepspeed" or "fsdp" folders, or a "file"."""
    name = cfg.strategy._target_.rpartition(".")[2]
    return {"DeepSpeed": "deepspeed", "FSDP": "fsdp"}.get(name, "file")


def build(cfg: DictConfig, bars: Bars) -> dict[str, Any]:
    """The algorithm, its data and the callbacks, in the order they act at a boundary."""
    check_settings(cfg)
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.trust_remote_code)
    if cfg.model.get("lora") is not None:
        trust = cfg.model.trust_remote_code
        path = model_directory(cfg.model.path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        check_lora(cfg.model.lora, empty_model(config, trust))
    source = instantiate(cfg.data)
    limits = Limits(**cfg.limits)
    if cfg.datamodule._target_.endswith("SFTDataModule"):
        algo = instantiate(cfg.algo)
        datamodule = instantiate(cfg.datamodule, source, tokenizer, bars, limits)
    else:
        algo = instantiate(cfg.algo, pad_token_id=tokenizer.pad_token_id)
        engine = instantiate(
            cfg.engine,
            eos_token_ids=eos_token_ids(cfg.model.path, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        allocator = instantiate(cfg.sampler.allocator)
        reward = make_reward(cfg.reward)
        datamodule = instantiate(
            cfg.datamodule, source, tokenizer, engine, reward, allocator, bars, limits
        )
    extra = {"export": {"tokenizer": tokenizer}}
    callbacks = [
        instantiate(node, **extra.get(name, {})) for name, node in cfg.callbacks.items() if node
    ]
    check_parts(algo, datamodule, task_overrides())
    return {"algo": algo, "datamodule": datamodule, "callbacks": callbacks}


def task_overrides() -> list[str]:
    """What the command line changed; nothing where no command began the run."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def build_trainer(
    cfg: DictConfig, callbacks: list[Callback], purge_step: int | None
) -> lightning.Trainer:
    nodes = [node.copy() for node in cfg.logger.values() if node]  # null leaves one out
    loggers = [
        instantiate(node, purge_step=purge_step) if "TensorBoard" in node._target_ else instantiate(node)
        for node in nodes
    ]
    plugins = cluster_plugins()
    if OmegaConf.select(cfg, "callbacks.checkpoint.asynchronous") and strategy_kind(cfg) == "file":
        plugins.append(asynchronous_io())
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, plugins=plugins)


def purge_step(state: dict[str, Any] | None) -> int | None:
    """First step of TensorBoard's that a resumed run writes anew."""
    if state is None:
        return None
    data = next(value for key, value in state.items() if key.endswith("DataModule"))
    return data["rollout_step"] + 1


def set_up_process(cfg: DictConfig) -> None:
    if cfg.num_threads is not None:
        if cfg.num_threads < 1:
            raise UserError(f"num_threads must be at least 1 or null, got {cfg.num_threads}.")
        torch.set_num_threads(cfg.num_threads)
    if cfg.seed < 0:
        raise UserError(f"seed must be at least 0, got {cfg.seed}.")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns wherever it is imported
    # Or trainer.deterministic fills every new tensor with NaN, here and inside a vLLM engine.
    torch.utils.deterministic.fill_uninitialized_memory = False
    keep_freed_memory()
    lightning.seed_everything(cfg.seed, verbose=False)


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep large freed blocks: a step frees and asks for the same sizes,
    and mapping them anew each time cost a fifth of a CPU training step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # another C library: nothing to tune
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**26)):
        libc.mallopt(option, value)


def quieten(run_dir: Path) -> None:
    """Libraries speak to `log.txt`; the terminal is for the run's own lines and warnings."""
    handler = logging.FileHandler(run_dir / log_name())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    if not is_first():  # rank 0 speaks for all
        for console in root.handlers:
            console.setLevel(logging.ERROR)
    root.addHandler(handler)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
