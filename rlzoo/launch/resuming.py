"""Whether a run can go on from a checkpoint as it is asked to, and whether anything is left."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlzoo.data.fingerprint import of_file
from rlzoo.data.rollout_files import rollout_files
from rlzoo.errors import UserError
from rlzoo.launch.configuration import leaves, overrides_given, plain
from rlzoo.launch.targets import present_name
from rlzoo.models.checkpoints import data_state, run_state
from rlzoo.models.loading import model_directory
from rlzoo.report.ledger import Ledger, Limits

# What a key may do when a run is resumed; the first pattern that fits counts, `*` is any text.
#   free: may change, and takes effect    rounding: likewise, but results are equal up to rounding
#   fixed: may not change                 anything else: may with resume=weights
RULES = (
    ("callbacks.sampler.max_tokens", "rounding"),
    ("callbacks.sampler.*", "fixed"),
    ("sampler.callback.max_tokens", "rounding"),
    ("*run_dir", "free"),
    ("sampler.*", "fixed"),
    ("seed", "fixed"),
    ("init_from", "fixed"),  # the reference policy starts there
    ("algo._target_", "fixed"),
    ("datamodule._target_", "fixed"),
    ("datamodule.prompts_per_epoch", "fixed"),
    ("datamodule.responses_per_*", "fixed"),
    ("datamodule.batch_size", "fixed"),
    ("datamodule.updates_per_step", "fixed"),
    ("datamodule.corpus*", "fixed"),
    ("datamodule.seed", "fixed"),
    ("model._target_", "fixed"),
    ("ckpt_path", "free"),
    ("resume", "free"),
    ("debug", "free"),
    ("doctor", "free"),
    ("val_every", "free"),
    ("sizes.prompts_per_epoch", "fixed"),  # as the keys that read them
    ("sizes.responses_per_step", "fixed"),
    ("sizes.max_response_tokens", "weights"),
    ("sizes.max_solution_tokens", "weights"),
    ("sizes.*", "free"),
    ("limits.*", "free"),
    ("logger*", "free"),
    ("hydra.*", "free"),
    ("callbacks*", "free"),
    ("num_threads", "rounding"),
    ("data.*", "free"),  # these say where prompts come from: their fingerprints are compared
    ("datamodule.max_prompt_tokens", "free"),
    ("datamodule.on_too_long", "free"),
    ("datamodule.val_responses", "free"),
    ("datamodule.allow_truncated_sampling", "free"),
    ("datamodule.rollouts", "free"),
    ("datamodule.replay", "free"),
    ("replay", "free"),
    ("model.path", "free"),  # likewise
    ("model.trust_remote_code", "free"),
    ("model.gradient_checkpointing", "free"),
    ("model.attention", "rounding"),
    ("reward.num_workers", "free"),
    ("reward.processes", "free"),
    ("reward.seconds_per_answer", "free"),
    ("reward.memory_mb", "free"),
    ("reward.recycle_after", "free"),
    ("engine*.dtype", "weights"),
    ("engine*.precision", "weights"),
    ("engine*.kv_cache_dtype", "weights"),
    ("engine*.options*", "weights"),
    ("engine*max_rows", "rounding"),
    ("engine*", "free"),  # which engine it is, is compared once it is built
    ("strategy._target_", "free"),  # likewise, by what the checkpoint is
    ("strategy.stage", "free"),
    ("strategy.timeout", "free"),
    ("trainer.accelerator", "weights"),
    ("trainer.precision", "weights"),
    ("trainer.accumulate_grad_batches", "weights"),
    ("trainer.gradient_clip_*", "weights"),
    ("trainer.deterministic", "rounding"),
    ("trainer.benchmark", "rounding"),
    ("trainer*", "free"),
    ("algo.tokens_per_microbatch", "rounding"),
    ("algo.max_tokens_per_microbatch", "rounding"),  # of older checkpoints
    ("algo.max_logprob_gap", "free"),
    ("algo.max_skipped_updates", "free"),
)
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


class Absent:
    """The value of a key that is not there."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


# --- what a checkpoint records ------------------------------------------------------------------


def record_of(cfg: DictConfig) -> dict[str, Any]:
    """What a checkpoint says of the configuration it was saved under."""
    return {
        "config": plain(cfg, resolve=True),
        "overrides": overrides_given(),
        "model": model_fingerprint(cfg.model.path),
    }


def model_fingerprint(path: str) -> dict[str, str] | None:
    """Digests of a model directory's config and of its weights' files; None of a hub name."""
    folder = Path(model_directory(path))
    if not folder.is_dir():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in VOLATILE}
    text = json.dumps(kept, sort_keys=True).encode()
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    digests = "".join(of_file(p) for p in files if p.is_file())
    return {
        "config": hashlib.blake2b(text, digest_size=16).hexdigest(),
        "weights": hashlib.blake2b(digests.encode(), digest_size=16).hexdigest(),
    }


def recorded(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """A checkpoint's record; for one that has none, its run's config.yaml; None without either."""
    found: dict[str, Any] | None = run_state(state).get("record")
    if found:
        return found
    file = checkpoint.parent.parent / "config.yaml"
    if not file.is_file():
        return None
    return {"config": OmegaConf.to_container(OmegaConf.load(file)), "overrides": [], "model": None}


# --- what differs -------------------------------------------------------------------------------


def check_changes(
    cfg: DictConfig, checkpoint: Path, state: dict[str, Any], exact: bool
) -> list[str]:
    """Compares the configuration with the one that a checkpoint was saved under.

    Args:
        exact: False if the optimizer starts anew (`resume=weights`), so that more may change.

    Returns:
        Sentences on what changes nothing but rounding.

    Raises:
        UserError: something differs that cannot be changed; the message lists all of it.
    """
    before = recorded(checkpoint, state)
    if before is None:
        return []
    found = differences(before["config"], cfg, before["overrides"], overrides_given())
    kinds = {key: kind_of_key(key) for key in found}
    held = ("fixed", "weights") if exact else ("fixed",)
    refused = {key: found[key] for key, kind in kinds.items() if kind in held}
    lines = [f"  {key}: {show(old)} -> {show(new)}" for key, (old, new) in refused.items()]
    movable = "fixed" not in kinds.values()  # by resume=weights
    model = model_fingerprint(cfg.model.path)
    if model and before["model"] and model != before["model"]:
        lines.append(f"  the model at model.path={cfg.model.path} is not the one of then")
        movable = False
    if lines:
        raise UserError(refusal(checkpoint, lines, exact, movable))
    rounding = [
        f"{key}: {show(found[key][0])} -> {show(found[key][1])}"
        for key, kind in kinds.items()
        if kind == "rounding"
    ]
    if not rounding or not exact:
        return []
    return [f"Resumed with {', '.join(rounding)}: the same run up to rounding, not to the digit."]


def refusal(checkpoint: Path, lines: Sequence[str], exact: bool, movable: bool) -> str:
    how = "exactly" if exact else "from its weights"
    mend = ["Give the values on the left"]
    if exact and movable:
        mend.append("add resume=weights, under which they may change and the optimizer starts anew")
    mend.append("start a new run_dir from the weights alone: init_from=CHECKPOINT")
    differ = "\n".join(lines)
    return (
        f"The run of {checkpoint} cannot be resumed {how}, since this differs from what it was"
        f" saved under:\n{differ}\n{', or '.join(mend)}."
    )


def kind_of_key(key: str) -> str:
    return next((kind for pattern, kind in RULES if fnmatchcase(key, pattern)), "weights")


def differences(
    before: dict[str, Any], cfg: DictConfig, given_before: Sequence[str], given_now: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ. One that follows another (`${...}`) is left to that one.

    A key that only one of them has counts if an override of its side names it; else it is a key
    that one version of rlzoo has and the other has not.
    """
    after, raw = plain(cfg, resolve=True), plain(cfg, resolve=False)
    old, new = dict(leaves(before)), dict(leaves(after))
    found = {}
    for key in dict.fromkeys([*old, *new]):
        # One may be a mapping, the other null.
        pair = present_name(value_at(before, key)), value_at(after, key)
        if pair[0] == pair[1] or all(value is None or value is ABSENT for value in pair):
            continue
        if pair[0] is ABSENT and not named(key, [*given_now, *deleted(given_before)]):
            continue
        if pair[1] is ABSENT and not named(key, [*given_before, *deleted(given_now)]):
            continue
        found[key] = pair
    return {key: pair for key, pair in found.items() if found.get(source_of(key, raw)) != pair}


def value_at(node: Any, key: str) -> Any:
    """What stands at a dotted key; ABSENT if nothing does."""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return ABSENT
        node = node[part]
    return node


def source_of(key: str, raw: dict[str, Any]) -> str:
    """The key that this one, or the node it is in, is set to (`${...}`); empty if it is its own."""
    parts = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parts, start=1):
        node = node.get(part) if isinstance(node, Mapping) else None
        reference = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
        if reference:
            return ".".join([reference.group(1), *parts[depth:]])
    return ""


def named(key: str, overrides: Iterable[str]) -> bool:
    """Whether an override names a key, or a node above it that is no config group's choice."""
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    return any(key == name or ("." in name and key.startswith(f"{name}.")) for name in names)


def deleted(overrides: Iterable[str]) -> list[str]:
    return [override for override in overrides if override.startswith("~")]


def show(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("_target_", "{...}"))
    return "null" if value is None else str(value)


# --- what is left -------------------------------------------------------------------------------


def reached(cfg: DictConfig, state: dict[str, Any]) -> list[str]:
    """The limits that a checkpoint's run has reached, each as `key=value`: none, if it can go on.

    The same on every rank, since it is read from the checkpoint.
    """
    data, ledger = data_state(state), Ledger()
    ledger.load_state_dict(run_state(state)["ledger"])
    limits = {
        name: value for name, value in vars(Limits(**cfg.limits)).items() if value is not None
    }
    met = [ledger.exceeded(Limits(**{name: value})) for name, value in limits.items()]
    epochs = data.get("epoch", data["rollout_step"])
    last = cfg.trainer.get("max_epochs")
    if last is not None and 0 <= last <= epochs:
        met.append(f"trainer.max_epochs={last}")
    replay = cfg.get("replay")
    if replay is not None and data["rollout_step"] >= len(rollout_files(replay, "replay")):
        met.append(f"the end of replay={replay}")
    return [limit for limit in met if limit]


def nothing_left(run_dir: Path, limits: Sequence[str], steps: int) -> str:
    """The line that is said of a run that has ended."""
    keys = [limit.partition("=")[0] for limit in limits]
    mends = ["give more files to replay=" if "replay" in key else f"raise {key}" for key in keys]
    return (
        f"rlzoo: nothing left to do: the run in {run_dir} has reached {' and '.join(limits)} after"
        f" {steps} rollout steps. To go on, {' and '.join(mends)}."
    )
