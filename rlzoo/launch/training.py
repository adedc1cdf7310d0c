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
from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from rlzoo.callbacks.checkpoint import asynchronous_io
from rlzoo.callbacks.doctor import Diagnosed
from rlzoo.callbacks.restore import Restore
from rlzoo.callbacks.seam import Parts
from rlzoo.callbacks.state import Run
from rlzoo.data.draw import Drawer
from rlzoo.data.sft import SFTDataModule
from rlzoo.engines.shapes import empty_model, expected_shapes
from rlzoo.errors import UserError
from rlzoo.export import write as write_policy
from rlzoo.launch import fitting, forecast
from rlzoo.launch.facts import on_gpu
from rlzoo.launch.idle import check_idle, check_idle_options
from rlzoo.launch.preflight import check_parts, check_pipeline
from rlzoo.launch.processes import cluster_plugins, is_first, log_name
from rlzoo.launch.resuming import check_changes, nothing_left, reached, record_of, recorded
from rlzoo.launch.run_dir import claim, clear, describe, find_checkpoint, make
from rlzoo.launch.schema import check_settings
from rlzoo.launch.summary import ended, summarize
from rlzoo.launch.targets import is_kind, target_of
from rlzoo.loop import RolloutLoop, SupervisedLoop
from rlzoo.models.checkpoints import (
    WEIGHTS_ALONE,
    data_state,
    kind_of,
    run_state,
    saved_by,
    whole_weights,
)
from rlzoo.models.loading import load_config
from rlzoo.models.lora import check_lora, lora_settings
from rlzoo.models.policy import eos_token_ids, load_tokenizer
from rlzoo.report.ledger import Ledger, Limits
from rlzoo.report.peaks import Peaks
from rlzoo.report.progress import Bars
from rlzoo.rewards.calling import make_reward

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
    try:
        make(run_dir)
        quieten(run_dir)
        check_idle(cfg)
        set_up_process(cfg)
        train_in(run_dir, cfg)
    finally:
        if lock is not None:
            lock.close()


def train_in(run_dir: Path, cfg: DictConfig) -> None:
    """`train`, in a directory that is this run's alone."""
    foreseen = fitting.settle(cfg)
    checkpoint, state = find_checkpoint(cfg.ckpt_path, run_dir)
    exact, before, bars = cfg.resume == "exact", None, Bars(enabled=is_first())
    if checkpoint is not None and state is not None:
        check_resume(cfg, checkpoint, state, exact)
        if limits := reached(cfg, state):
            if is_first():
                leave_as_it_is(cfg, checkpoint, state, limits, bars)
            return
        before = recorded(checkpoint, state) if is_of(run_dir, checkpoint) else None
    loop, others = build(cfg, bars)
    run, data = loop.run, loop.data
    run.exact = data.exact = exact
    run.record = record_of(cfg)
    callbacks = [*loop.parts.present, *others, loop]
    if checkpoint is not None and state is not None and not exact:
        loop.algo.restored_weights = partial(whole_weights, checkpoint)
        callbacks.insert(0, Restore(state, data))
    run.ledger.peaks = Peaks(on_gpu(cfg))
    if is_first():
        log.info(forecast.line(foreseen))
        loop.measured = partial(tell_memory, foreseen, run_dir, bars)

        def begun() -> None:
            describe(run_dir, cfg, before and before["config"])
            forecast.write(foreseen, run_dir)

        loop.begun = begun
    trainer = build_trainer(cfg, callbacks, purge_step(cfg, state))
    del state  # mapped from a file, which would keep its room on the disk once it is removed
    try:
        run.ledger.start()
        path = checkpoint if exact else None
        trainer.fit(loop.algo, datamodule=data, ckpt_path=path, weights_only=True)
    except Diagnosed:
        bars.print_line("doctor=true: nothing was trained.")
        leave_as_found(run_dir, cfg, run)
        return
    except UserError:
        leave_as_found(run_dir, cfg, run)
        raise
    finally:
        run.close()
    if is_first():
        export = loop.parts.export
        fault = None if export is None else export.fault
        finish(cfg, run, data.rollout_step, fault)


def tell_memory(
    foreseen: forecast.Forecast,
    run_dir: Path,
    bars: Bars,
    measured: dict[str, float],
    first: bool,
) -> None:
    """Puts what phases took beside what they were to take, in the log and in forecast.json."""
    if first:
        bars.print_line(forecast.compared(foreseen, measured))
    forecast.write(foreseen, run_dir, measured)


def leave_as_found(run_dir: Path, cfg: DictConfig, run: Run) -> None:
    """After a start that trained nothing, a new run may begin in its directory."""
    if is_first() and cfg.ckpt_path is None and run.ledger.updates == 0:
        clear(run_dir)


def is_of(run_dir: Path, checkpoint: Path | None) -> bool:
    """Whether a checkpoint is of the run in this directory, not one that a run branches from."""
    return checkpoint is not None and run_dir.resolve() in checkpoint.parents


def finish(cfg: DictConfig, run: Run, rollout_steps: int, fault: Exception | None) -> None:
    """Sums up, and then speaks of what went wrong at the end.

    Args:
        fault: why the policy was not written.

    Raises:
        UserError: the policy or the summary could not be written; how to get them.
    """
    run_dir = Path(cfg.run_dir)
    mends = []
    if fault is not None:
        last = run_dir / "checkpoints" / "last.ckpt"
        said = " ".join(str(fault).split())
        mends.append(
            f"policy/ was not written: {said} The run is whole in {last}: once that is mended,"
            f" python -m rlzoo.export {last} {run_dir / 'policy'}"
        )
    try:
        for line in summarize(run_dir, cfg, run, rollout_steps, exported=fault is None):
            run.bars.print_line(line)
    except Exception as error:
        mends.append(
            f"summary.json or learning.png could not be written: {type(error).__name__}: {error}."
            " metrics.csv has their figures"
        )
    if mends:
        raise UserError(f"The run came to its end, but {'; and '.join(mends)}.")


def leave_as_it_is(
    cfg: DictConfig, checkpoint: Path, state: dict[str, Any], limits: list[str], bars: Bars
) -> None:
    """Says that a run has ended; if it was stopped before all of its end was written, writes it."""
    run_dir, steps = Path(cfg.run_dir), data_state(state)["rollout_step"]
    if is_of(run_dir, checkpoint) and not ended(run_dir, steps):
        run, fault = Run(Limits(), Ledger(), bars, exact=False), None
        run.load_state_dict(run_state(state))
        run.ended_by = " and ".join(limits)
        if OmegaConf.select(cfg, "callbacks.export"):
            try:
                write_policy(checkpoint, run_dir / "policy", cfg.model.path)
            except Exception as error:
                fault = error
        finish(cfg, run, steps, fault)
    bars.print_line(nothing_left(run_dir, limits, steps))


def check_resume(cfg: DictConfig, checkpoint: Path, state: dict[str, Any], exact: bool) -> None:
    """Whether the run can go on where the checkpoint is.

    Args:
        exact: with its optimizer and schedule.

    Raises:
        UserError: it cannot, and `resume=weights` was not asked for; another model saved it; or
            something is asked for that it cannot go on with.
    """
    if cfg.get("doctor"):
        raise UserError(
            "doctor=true looks at the first rollout step of a new run, and trains nothing. Leave"
            " out ckpt_path and name a new run_dir, or leave out doctor=true."
        )
    saved = saved_by(state)
    if exact and state.get(WEIGHTS_ALONE):
        raise UserError(
            f"The checkpoint {checkpoint} holds weights alone, as the best ones do, so that the"
            " optimizer cannot go on from it. Resume the last one with ckpt_path=last, or add"
            " resume=weights: data, counts and outputs go on from there, the optimizer starts anew."
        )
    check_model(cfg, checkpoint, saved)
    check_same_lora(cfg, checkpoint, state.get("lora"))
    if exact:
        check_strategy(cfg, checkpoint, saved)
    for line in check_changes(cfg, checkpoint, state, exact):
        log.warning(line)


def check_model(cfg: DictConfig, checkpoint: Path, saved: dict[str, Any]) -> None:
    """Raises a UserError if a checkpoint is of a model of another size than the run's."""
    trust = cfg.model.trust_remote_code
    config = load_config(cfg.model.path, trust)
    count = sum(shape.numel() for shape in expected_shapes(config, trust).values())
    if not saved["model"].endswith(f" of {count:,} parameters"):
        raise UserError(
            f"The checkpoint {checkpoint} is of {saved['model']}, but model.path={cfg.model.path}"
            f" has {count:,}. Resume with the model it was saved from, or start a new run_dir."
        )


def check_strategy(cfg: DictConfig, checkpoint: Path, saved: dict[str, Any]) -> None:
    """Raises a UserError if this run could not read a checkpoint's optimizer state."""
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    kind = strategy_kind(cfg)
    if kind == kind_of(checkpoint) != "deepspeed":
        return
    if kind == kind_of(checkpoint) and saved["ranks"] == ranks:
        if saved["strategy"].endswith(f" stage {cfg.strategy.get('stage')}"):
            return
    name = cfg.strategy._target_.rpartition(".")[2]
    raise UserError(
        f"The checkpoint {checkpoint} was saved by {saved['ranks']} process(es) under"
        f" {saved['strategy']}; this run has {ranks} under {name}, which cannot read its optimizer"
        " state. Resume as it was saved, or add resume=weights: weights, data, counts and outputs"
        " go on from there, the optimizer starts anew."
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
    strategy = target_of(cfg.strategy)
    if is_kind(strategy, DeepSpeedStrategy):
        return "deepspeed"
    return "fsdp" if is_kind(strategy, ModelParallelStrategy) else "file"


def build(cfg: DictConfig, bars: Bars) -> tuple[RolloutLoop | SupervisedLoop, list[Callback]]:
    """The loop with all its parts, and the callbacks of the configuration that are none of them."""
    check_settings(cfg)
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.trust_remote_code)
    if cfg.model.get("lora") is not None:
        trust = cfg.model.trust_remote_code
        config = load_config(cfg.model.path, trust)
        check_lora(cfg.model.lora, empty_model(config, trust))
    source, limits, ledger = instantiate(cfg.data), Limits(**cfg.limits), Ledger()
    loop: type[RolloutLoop] | type[SupervisedLoop]
    if is_kind(target_of(cfg.datamodule), SFTDataModule):
        loop, algo = SupervisedLoop, instantiate(cfg.algo)
        data = instantiate(cfg.datamodule, source, tokenizer)
        run = Run(limits, ledger, bars)
    else:
        loop, algo = RolloutLoop, instantiate(cfg.algo, pad_token_id=tokenizer.pad_token_id)
        engine = instantiate(
            cfg.engine,
            eos_token_ids=eos_token_ids(cfg.model.path, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        allocator, reward = instantiate(cfg.sampler.allocator), make_reward(cfg.reward)
        data = instantiate(cfg.datamodule, source, tokenizer, allocator)
        drawer = Drawer(engine, reward, tokenizer, data.params, ledger, bars, data.seed)
        run = Run(limits, ledger, bars, drawer)
        if cfg.pipeline == "one_step":
            check_pipeline(algo, data, engine)
            run.draws_ahead = True
    algo.ledger = ledger
    parts, others = build_callbacks(cfg, tokenizer)
    check_parts(algo, data, limits)
    check_idle_options(algo)
    return loop(run, data, algo, parts), others


def build_callbacks(
    cfg: DictConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Parts, list[Callback]]:
    """The parts of the loop, by their names, and all other callbacks, in their order."""
    extra = {"export": {"tokenizer": tokenizer}}
    built = {
        name: instantiate(node, **extra.get(name, {}))
        for name, node in cfg.callbacks.items()
        if node
    }
    parts = Parts(**{name: built.pop(name) for name in Parts.kinds() if name in built})
    for name, callback in built.items():
        if (part := Parts.name_of(callback)) is not None:
            raise UserError(
                f"callbacks.{name} would do nothing: the loop calls a {type(callback).__name__}"
                f" under the name callbacks.{part} alone. Give its settings there."
            )
    return parts, list(built.values())


def build_trainer(
    cfg: DictConfig, callbacks: list[Callback], purge_step: int | None
) -> lightning.Trainer:
    nodes = [node.copy() for node in cfg.logger.values() if node]  # null leaves one out
    loggers = [
        instantiate(node, purge_step=purge_step)
        if is_kind(target_of(node), TensorBoardLogger)
        else instantiate(node)
        for node in nodes
    ]
    plugins = cluster_plugins()
    if OmegaConf.select(cfg, "callbacks.checkpoint.asynchronous") and strategy_kind(cfg) == "file":
        plugins.append(asynchronous_io())
    given = {"callbacks": callbacks, "logger": loggers, "plugins": plugins}
    trainer: lightning.Trainer = instantiate(cfg.trainer, **given)
    return trainer


def purge_step(cfg: DictConfig, state: dict[str, Any] | None) -> int | None:
    """First step of TensorBoard's that a resumed run writes anew; 0 of one that was stopped before
    it had saved; None of a new run."""
    if state is None:
        return None if cfg.ckpt_path is None else 0
    return int(data_state(state)["rollout_step"]) + 1


def set_up_process(cfg: DictConfig) -> None:
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns wherever it is imported
    # Or trainer.deterministic fills every new tensor with NaN, here and inside a vLLM engine.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (untyped)
    if cfg.trainer.accelerator == "cpu":
        keep_freed_memory()
    lightning.seed_everything(cfg.seed, verbose=False)


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep large freed blocks: a step frees and asks for the same sizes,
    and mapping them anew each time cost a fifth of a CPU training step. A process keeps its peak by
    that, so it is not for hosts of GPUs, where a step's memory is elsewhere."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # another C library: nothing to tune
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**26)):
        libc.mallopt(option, value)


def quieten(run_dir: Path) -> None:
    """Libraries speak to `log.txt`; the terminal is for the run's own lines and warnings."""
    handler = logging.FileHandler(run_dir / log_name(), delay=True)  # made by its first line
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
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "transformers",
        "py.warnings",
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
