from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.errors import UserError
from rlzoo.export import rehearse, save_policy
from rlzoo.models.lora import adapter_weights, write_adapter
from rlzoo.ranks.exchange import all_gather
from rlzoo.values import PathText


class Export(Callback):
    """Writes the final policy and its tokenizer to `policy/`, in Hugging Face format.

    A policy with LoRA is written whole, adapters merged; the adapters alone go to `adapter/`, in
    peft's format. All but the weights is tried before the run draws anything. A failure at the end
    is kept in `fault`: the rest of the end still happens, then the run's last word speaks of it.

    Args:
        run_dir: where `policy/` goes.
        tokenizer: saved beside the weights.
    """

    def __init__(self, run_dir: PathText, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.tokenizer = Path(run_dir) / "policy", tokenizer
        self.fault: Exception | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyAlgorithm)
        fault = None
        if trainer.is_global_zero:
            fault = rehearse(pl_module.policy, self.tokenizer, self.folder.parent)
        fault = all_gather(fault)[0]  # so that every rank ends
        if fault:
            raise UserError(fault)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyAlgorithm)
        first = trainer.is_global_zero
        state = whole_state(pl_module, keep=first)
        adapters = adapter_weights(pl_module.policy, keep=first)
        if not first:
            return
        try:
            save_policy(pl_module.policy, self.tokenizer, self.folder, state)
            if adapters:
                write_adapter(pl_module.policy, self.folder.with_name("adapter"), adapters)
        except Exception as error:  # whatever it is, checkpoint and summary are worth more
            self.fault = error


def whole_state(module: PolicyAlgorithm, keep: bool) -> dict[str, Tensor]:
    """The policy's weights on the CPU; collective, so that ranks that keep none walk along."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.named_weights() if keep}
