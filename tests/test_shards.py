"""Nothing in a sharded checkpoint is run, whoever made it."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rlzoo.models.checkpoints import FSDP_META, read_state, whole_weights


class Evil:
    """Leaves a mark where its pickle is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def shards(folder: Path, **more: object) -> Path:
    """A folder as FSDP leaves it, written by one process."""
    weights = {"policy.head": torch.ones(3, 2, dtype=torch.bfloat16), "policy.bias": torch.zeros(2)}
    optimizer = {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "name": "policy"}]}
    dcp.save({"state_dict": weights, "optimizer_states": optimizer} | more, checkpoint_id=folder)
    torch.save({"loops": {}, "callbacks": {}}, folder / FSDP_META)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_an_ordinary_one_is_read(tmp_path):
    folder = shards(tmp_path / "good")
    assert read_state(folder) == {"loops": {}, "callbacks": {}}
    assert whole_weights(folder)["policy.head"].tolist() == 3 * [[1, 1]]


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("read", [read_state, whole_weights])
@pytest.mark.parametrize("where", ["metadata", "shard"])
def test_code_in_it_is_refused_and_not_run(where, read, tmp_path):
    mark = tmp_path / "run"
    if where == "shard":
        folder = shards(tmp_path / "bad", callbacks=Evil(mark))
    else:
        folder = shards(tmp_path / "bad")
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(pickle.UnpicklingError):
        read(folder)
    assert not mark.exists()
