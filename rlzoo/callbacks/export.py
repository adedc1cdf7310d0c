from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlzoo.models.lora import lora_of, save_adapter
from rlzoo.values import PathText


class Export(Callback):
    """Writes the final policy and its tokenizer to `policy/`, in Hugging Face format.

    A policy with LoRA is written whole, adapters merged; the adapters alone go to `adapter/`, in
    peft's format.

    Args:
        run_dir: where `policy/` goes.
        tokenizer: saved beside the weights.
    """

    def __init__(self, run_dir: PathText, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.tokenizer = Path(run_dir) / "policy", tokenizer

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = whole_state(pl_module, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            pl_module.policy.save_pretrained(self.folder, state_dict=state)
            self.tokenizer.save_pretrained(self.folder)
        if lora_of(pl_module.policy) is not None:
            folder = self.folder.with_name("adapter")
            save_adapter(pl_module.policy, folder, keep=trainer.is_global_zero)


def whole_state(module: LightningModule, keep: bool) -> dict[str, Tensor]:
    """The policy's weights on the CPU; collective, so that ranks that do not keep them walk along."""
    return {
        name: tensor.detach().cpu().clone() for name, tensor in module.named_weights() if keep
    }
