"""A run from its configuration: claim the directory, build the parts, fit, sum up."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from hydra.utils import instantiate
from lightning import Callback
from omegaconf import DictConfig

from rlzoo.callbacks.doctor import Diagnosed
from rlzoo.errors import UserError
from rlzoo.ledger import Limits
from rlzoo.models.policy import eos_token_ids, load_tokenizer
from rlzoo.progress import Bars
from rlzoo.run_dir import claim, describe, find_checkpoint
from rlzoo.summary import summarize

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    """Trains as the configuration says; what is left behind explains itself.

    Raises:
        UserError: anything the user can mend.
    """
    run_dir = Path(cfg.run_dir)
    lock = claim(run_dir, resuming=cfg.ckpt_path is not None)
    quieten(run_dir)
    set_up_process(cfg)
    checkpoint = find_checkpoint(cfg.ckpt_path, run_dir)
    bars = Bars(enabled=rank_zero())
    parts = build(cfg, bars)
    trainer = build_trainer(cfg, parts["callbacks"], purge_step(checkpoint))
    if rank_zero():
        describe(run_dir, cfg)
    data = parts["datamodule"]
    try:
        data.ledger.start()
        trainer.fit(parts["algo"], datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Diagnosed:
        bars.print_line("doctor=true: nothing was trained.")
        return
    finally:
        data.teardown("fit")
    if rank_zero():
        for line in summarize(run_dir, cfg, data):
            bars.print_line(line)
    lock.close()


def build(cfg: DictConfig, bars: Bars) -> dict[str, Any]:
    """The algorithm, its data and the callbacks, in the order they act at a boundary."""
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.trust_remote_code)
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
        reward = instantiate(cfg.reward)
        datamodule = instantiate(
            cfg.datamodule, source, tokenizer, engine, reward, allocator, bars, limits
        )
    extra = {"export": {"tokenizer": tokenizer}}
    callbacks = [
        instantiate(node, **extra.get(name, {})) for name, node in cfg.callbacks.items() if node
    ]
    return {"algo": algo, "datamodule": datamodule, "callbacks": callbacks}


def build_trainer(
    cfg: DictConfig, callbacks: list[Callback], purge_step: int | None
) -> lightning.Trainer:
    nodes = [node.copy() for node in cfg.logger.values()]
    loggers = [
        instantiate(node, purge_step=purge_step) if "TensorBoard" in node._target_ else instantiate(node)
        for node in nodes
    ]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)


def purge_step(checkpoint: Path | None) -> int | None:
    """First step of TensorBoard's that a resumed run writes anew."""
    if checkpoint is None:
        return None
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
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
    handler = logging.FileHandler(run_dir / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False


def rank_zero() -> bool:
    return lightning.pytorch.utilities.rank_zero_only.rank == 0
