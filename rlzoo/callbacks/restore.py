from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class Restore(Callback):
    """Puts data, counts and outputs where a checkpoint had them, under another strategy or number of
    ranks than it was saved by (`resume=weights`): the weights are loaded as the model is built, the
    optimizer and its schedule start anew.

    Args:
        state: of the checkpoint, see `rlzoo.models.checkpoints.read_state`.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.datamodule.load_state_dict(self.state[type(trainer.datamodule).__qualname__])
        for callback in trainer.callbacks:
            if callback.state_key in self.state["callbacks"]:
                callback.load_state_dict(self.state["callbacks"][callback.state_key])
        self.state = {}  # mapped from a file that will be removed
