"""What a checkpoint on the disk holds, whichever strategy wrote it."""

from __future__ import annotations

import io
import pickle
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rlzoo.errors import UserError
from rlzoo.models.lora import merged

FORMAT = 2  # of the checkpoint; raised when old ones can no longer be resumed
SAVED = re.compile(r"step_\d{6,}\.ckpt")  # names of ours; what else lies beside them is not
BEST = re.compile(r"weights_\d{6,}\.ckpt")  # likewise, of weights alone
UNFINISHED = re.compile(r"((step|weights)_\d{6,}|last|best)\.ckpt\.partial")
WEIGHTS_ALONE = "weights_alone"  # key of a file without optimizer, which the best ones are
DEEPSPEED_TAG = "checkpoint"  # Lightning's name for the folder of DeepSpeed's shards
FSDP_META = "meta.pt"  # Lightning's name for what is not sharded
_DCP = "torch.distributed.checkpoint"
FSDP_NAMES = {  # what the `.metadata` of FSDP's shards may name; they hold names and numbers alone
    "pathlib": ("PosixPath",),
    "collections": ("OrderedDict",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_DCP}.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
}


def kind_of(path: Path) -> str:
    """ "file", "deepspeed" or "fsdp"; a ValueError for anything else."""
    if path.is_file():
        return "file"
    if (path / DEEPSPEED_TAG).is_dir():
        return "deepspeed"
    if (path / FSDP_META).is_file():
        return "fsdp"
    raise ValueError(f"{path} is neither a file nor a folder that DeepSpeed or FSDP wrote")


def is_checkpoint(path: Path) -> bool:
    try:
        return bool(kind_of(path))
    except ValueError:
        return False


def read_state(path: Path) -> dict[str, Any]:
    """All that is not sharded: counts, positions, the callbacks' states; in a file, weights too.

    Nothing in the checkpoint is run, neither here nor by whoever reads it after this: every part is
    read with torch's `weights_only`, or by its rules.
    """
    kind = kind_of(path)
    if kind == "deepspeed":
        shards = sorted((path / DEEPSPEED_TAG).glob("*.pt"))
        states = map(load_safely, shards)  # DeepSpeed reads them without, so all are read before
        found = [state for state in states if "module" in state]
        return found[0]  # of rank 0, which alone has what loggers wrote
    if kind == "fsdp":
        check_shards(path)
    return load_safely(path if kind == "file" else path / FSDP_META)


def load_safely(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(harmless_globals()):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def harmless_globals() -> list[Any]:
    """Classes of DeepSpeed's own that its shards name; they hold numbers alone."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:
        return []
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class Harmless(pickle.Unpickler):
    """Reads FSDP's `.metadata`, of which torch itself would run whatever is in it."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in FSDP_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that FSDP's shards name")


def check_shards(path: Path) -> None:
    """Reads all of an FSDP folder that is neither a tensor nor read with `weights_only` by torch.

    Raises:
        pickle.UnpicklingError: something in it would be run.
    """
    for file in path.glob("*.metadata"):
        with file.open("rb") as stream:
            metadata = Harmless(stream).load()
        for index, place in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                with (path / place.relative_path).open("rb") as shard:
                    shard.seek(place.offset)
                    torch.load(io.BytesIO(shard.read(place.length)), weights_only=True)


def data_state(state: dict[str, Any]) -> dict[str, Any]:
    """What the run's DataModule saved, of whatever class it is.

    Raises:
        UserError: none did.
    """
    for found in state.values():
        if isinstance(found, dict) and "rollout_step" in found:
            return found
    raise UserError(
        "The checkpoint holds no rollout step, so no run of rlzoo's can go on from it. Take its"
        " weights alone with init_from=CHECKPOINT."
    )


def run_state(state: dict[str, Any]) -> dict[str, Any]:
    """What `rlzoo.callbacks.state.Run` saved; in older checkpoints it stands with the data's."""
    found: dict[str, Any] | None = state.get("callbacks", {}).get("Loop")
    if found is not None:
        return found
    data = data_state(state)
    drawn_by = (data.get("fingerprint") or {}).get("engine")
    return {"ledger": data["ledger"], "record": data.get("record"), "drawn_by": drawn_by}


def whole_weights(path: Path) -> dict[str, Tensor]:
    """Every parameter of the trained module, whole, on the CPU, by the module's own names.

    Raises:
        UserError: DeepSpeed wrote it and is not installed here.
    """
    kind = kind_of(path)
    if kind == "deepspeed":
        try:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        except ImportError as error:
            raise UserError(
                f"{path} was written by DeepSpeed, which is not installed here: install"
                " rlzoo[deepspeed]."
            ) from error
        read_state(path)
        with redirect_stdout(io.StringIO()):  # what it prints is its own progress
            found = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=DEEPSPEED_TAG)
        return {name: tensor.clone() for name, tensor in found.items()}
    state = read_state(path)
    if kind == "fsdp":
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        state = _load_distributed_checkpoint(path)
    weights: dict[str, Tensor] = state["state_dict"]
    return weights


def policy_weights(path: Path) -> dict[str, Tensor]:
    """The policy's weights, whole, by the names its model has without adapters, which are merged.

    Raises:
        UserError: see `whole_weights`.
    """
    weights = whole_weights(path)
    policy = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    lora = read_state(path).get("lora")
    return dict(merged(policy, lora["alpha"] / lora["r"])) if lora else policy


def saved_by(state: dict[str, Any]) -> dict[str, Any]:
    """How the run was set up that saved it: `strategy`, `ranks`, `model`.

    Raises:
        UserError: it has another format, or is no checkpoint of rlzoo's.
    """
    mine = state.get("callbacks", {}).get("Checkpoint", {})
    if mine.get("format") != FORMAT:
        raise UserError(
            f"The checkpoint has format {mine.get('format')}, this version of rlzoo reads {FORMAT}."
            " Take its weights alone with init_from=CHECKPOINT."
        )
    saved: dict[str, Any] = mine["saved_by"]
    return saved
