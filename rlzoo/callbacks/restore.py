from __future__ import annotations

from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer

from rlzoo.callbacks.seam import callbacks_of


class Restore(Callback):
    """Puts data, counts and outputs where a checkpoint had them, under another strategy or number
    of ranks than it was saved by (`resume=weights`): the weights are loaded as the model is built,
    the optimizer and its schedule start anew.

    Args:
        state: of the checkpoint, see `rlzoo.models.checkpoints.read_state`.
        data: the run's.
    """

    def __init__(self, state: dict[str, Any], data: LightningDataModule) -> None:
        self.state, self.data = state, data

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.data.load_state_dict(self.state[type(self.data).__qualname__])
        for callback in callbacks_of(trainer):
            callback.on_load_checkpoint(trainer, pl_module, self.state)
            if callback.state_key in self.state["callbacks"]:
                callback.load_state_dict(self.state["callbacks"][callback.state_key])
        self.state = {}  # mapped from a file that will be removed
