"""`python -m rlzoo.export CKPT OUT`: any checkpoint as a directory in Hugging Face format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from rlzoo.checkpoints import kind_of, policy_weights
from rlzoo.errors import UserError
from rlzoo.models.policy import load_tokenizer, model_directory


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
        checkpoint: see `rlzoo.checkpoints`.
        out: a directory that is not there yet, or is empty.
        model: directory or hub name of the model it was trained from.

    Raises:
        UserError: no checkpoint, no such model, another model, or a directory in use.
    """
    try:
        kind_of(checkpoint)
    except ValueError as error:
        raise UserError(f"{error}, so there is nothing to export.") from error
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty. Name a directory that is not there yet.")
    cfg = run_config(checkpoint)
    path = model or OmegaConf.select(cfg, "model.path")
    if path is None:
        raise UserError(
            f"{checkpoint} lies in no run directory whose config.yaml names a model. Say what it was"
            " trained from: --model DIRECTORY."
        )
    trust = bool(OmegaConf.select(cfg, "model.trust_remote_code", default=False))
    config = AutoConfig.from_pretrained(model_directory(path), trust_remote_code=trust)
    policy = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=trust
    )
    try:
        missing, unexpected = policy.load_state_dict(policy_weights(checkpoint), strict=False)
    except RuntimeError as error:
        raise UserError(f"{checkpoint} is of another model than {path}: {error}") from error
    tied = set(getattr(policy, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise UserError(
            f"{checkpoint} is of another model than {path}: it lacks {sorted(missing)[:3]} and has"
            f" {sorted(unexpected)[:3]} beside. Name the model it was trained from with --model."
        )
    policy.save_pretrained(out)
    load_tokenizer(path, trust).save_pretrained(out)
    print(f"{out} holds the policy of {checkpoint} in Hugging Face format.")


def run_config(checkpoint: Path) -> OmegaConf:
    """config.yaml of the run directory that a checkpoint lies in; empty if there is none."""
    found = checkpoint.parent.parent / "config.yaml"
    return OmegaConf.load(found) if found.is_file() else OmegaConf.create({})


if __name__ == "__main__":
    main()
