"""The critic of PPO: a value for the state before each response token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlzoo.models.logits import backbone_of
from rlzoo.models.logprobs import response_hidden
from rlzoo.types import RolloutBatch


class Critic(nn.Module):
    """A scalar head on hidden states, of a backbone of its own or of the policy's trunk.

    The head starts at 0, so the first values are 0.

    Args:
        hidden_size: D, of the hidden states.
        backbone: a causal language model whose output head is left out; None if the policy's
            hidden states are used.
    """

    backbone: PreTrainedModel | None

    def __init__(self, hidden_size: int, backbone: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.backbone = None if backbone is None else cast(PreTrainedModel, backbone_of(backbone))
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: RolloutBatch, policy_hidden: Tensor) -> Tensor:
        """[M] float32 values of a microbatch's response tokens, row by row.

        Args:
            policy_hidden: [M, D] of `response_hidden`, what a shared trunk reads from.
        """
        hidden = policy_hidden
        if self.backbone is not None:
            hidden = response_hidden(self.backbone, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return values.float()[:, 0]
