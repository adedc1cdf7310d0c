"""`python -m rlzoo.export CKPT OUT`: any checkpoint as a directory in Hugging Face format."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlzoo.errors import UserError
from rlzoo.models.checkpoints import kind_of, policy_weights, read_state, run_state
from rlzoo.models.finite import not_finite
from rlzoo.models.loading import load_config, model_directory
from rlzoo.models.policy import load_tokenizer

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.export", description=__doc__)
    parser.add_argument("checkpoint", help="a file, or a folder that DeepSpeed or FSDP wrote")
    parser.add_argument("out", help="the directory to make")
    parser.add_argument(
        "--model", help="what it was trained from; by default what its run's config.yaml says"
    )
    arguments = parser.parse_args()
    try:
        export(Path(arguments.checkpoint).resolve(), Path(arguments.out), arguments.model)
    except UserError as error:
        print(f"rlzoo: {error}", file=sys.stderr)
        sys.exit(2)


def export(checkpoint: Path, out: Path, model: str | None = None) -> None:
    """Writes the policy of a checkpoint, with its tokenizer, as `save_pretrained` does.

    Sharded weights are put together on the CPU, and adapters merged into them; nothing else is
    needed of the machine that trained.

    Args:
        checkpoint: see `rlzoo.models.checkpoints`.
        out: a directory that is not there yet, or is empty.
        model: directory or hub name of the model it was trained from.

    Raises:
        UserError: no checkpoint, no such model, another model, weights that are no numbers, or a
            directory in use.
    """
    try:
        kind_of(checkpoint)
    except ValueError as error:
        raise UserError(f"{error}, so there is nothing to export.") from error
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is not empty. Name a directory that is not there yet.")
    write(checkpoint, out, model)
    print(f"{out} holds the policy of {checkpoint} in Hugging Face format.")


def write(checkpoint: Path, out: Path, model: str | None = None) -> None:
    """`export`, whatever is in the directory."""
    cfg = run_config(checkpoint)
    path = model or OmegaConf.select(cfg, "model.path")
    if path is None:
        raise UserError(
            f"{checkpoint} lies in no run directory whose config.yaml names a model. Say what it"
            " was trained from: --model DIRECTORY."
        )
    trust = bool(OmegaConf.select(cfg, "model.trust_remote_code", default=False))
    config = load_config(path, trust)
    weights = policy_weights(checkpoint)
    dtype = next(t.dtype for t in weights.values() if t.is_floating_point())
    policy = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    with suppress(OSError):  # a model need not have one
        policy.generation_config = GenerationConfig.from_pretrained(model_directory(path))
    try:
        missing, unexpected = policy.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{checkpoint} is of another model than {path}: {error}") from error
    tied = set(getattr(policy, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise UserError(
            f"{checkpoint} is of another model than {path}: it lacks {sorted(missing)[:3]} and has"
            f" {sorted(unexpected)[:3]} beside. Name the model it was trained from with --model."
        )
    save_policy(policy, load_tokenizer(path, trust), out, policy.state_dict())


def save_policy(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Tensor],
) -> None:
    """A policy and its tokenizer, by `save_pretrained`.

    A generation config that transformers reads and refuses to write (such as temperature=0.6 with
    do_sample=false) is written as the model has it: it changes nothing about the weights, and
    whoever loads the policy gets what the model that it was trained from would give.

    Args:
        state: the weights to write, whole, on the CPU.

    Raises:
        UserError: a weight is NaN or infinite; nothing is written then.
    """
    broken = not_finite(state.items())
    if broken:
        raise UserError(
            f"The policy is not written to {folder}, since {broken} holds NaN or inf: it is no"
            " policy any more. Export an earlier checkpoint, and train with a lower lr or in wider"
            " numbers (model.dtype=float32)."
        )
    own = getattr(policy, "generation_config", None)
    refused: GenerationConfig | None = own if generation_fault(own) else None
    if refused is not None:
        policy.generation_config = GenerationConfig()
    try:
        policy.save_pretrained(folder, state_dict=state)
    finally:
        if refused is not None:
            policy.generation_config = refused
    if refused is not None:
        refused.to_json_file(folder / "generation_config.json", use_diff=True)
    tokenizer.save_pretrained(folder)


def generation_fault(config: GenerationConfig | None) -> str | None:
    """Why transformers would not write a generation config, in a line; None if it would."""
    if config is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except ValueError as error:
            return " ".join(str(error).split())
    return None


def rehearse(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: Path
) -> str | None:
    """Does all that `save_policy` does but for the weights, so that what stands against it is known
    before anything is drawn: what, and how to mend it; None if nothing does."""
    try:
        with tempfile.TemporaryDirectory(dir=run_dir, prefix=".rehearsal-") as folder:
            save_policy(policy, tokenizer, Path(folder), {})
    except Exception as error:
        return (
            "The policy could be trained, but not written at the end, since its config or tokenizer"
            f" cannot be saved: {type(error).__name__}: {' '.join(str(error).split())}. Mend the"
            " files of model.path, or train without an export: callbacks.export=null."
        )
    fault = generation_fault(getattr(policy, "generation_config", None))
    if fault:
        log.warning(
            "The model's generation_config.json contradicts itself, and is copied to policy/ as it"
            " is: %s",
            fault,
        )
    return None


def run_config(checkpoint: Path) -> DictConfig | ListConfig:
    """config.yaml of the run directory that a checkpoint lies in; else what the checkpoint says it
    was saved under; empty if it says nothing."""
    found = checkpoint.parent.parent / "config.yaml"
    if found.is_file():
        return OmegaConf.load(found)
    try:
        config = DictConfig(run_state(read_state(checkpoint))["record"]["config"])
    except (KeyError, TypeError, UserError):  # older ones have no record
        config = DictConfig({})
    return config


if __name__ == "__main__":
    main()
