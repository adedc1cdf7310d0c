from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.learning.advantages import generalized_advantages, whiten
from rlzoo.learning.losses import LossOutput, value_loss
from rlzoo.models.critic import Critic
from rlzoo.models.flops import trunk_flops
from rlzoo.models.logits import hidden_size
from rlzoo.models.logprobs import response_hidden, response_scores, spread
from rlzoo.models.packed import set_attention
from rlzoo.types import Credit, OptimizerFactory, PolicyFactory, RolloutBatch, Rollouts
from rlzoo.values import AtLeast0, Positive, Share


class PPO(PolicyAlgorithm):
    """Proximal Policy Optimization with a critic (arXiv:1707.06347).

    Trains on every rollout, credits each token by generalized advantage estimation from the
    critic's values (whitened over all tokens of the rollout step), and minimises the clipped
    surrogate plus the critic's clipped squared error. The reward stands at the last token. Actor
    and critic are two parameter groups of one optimizer, each clipped by its own norm. ppo.yaml
    departs from the paper in a dual clip of 3 and the clip of the values, both from released code,
    and in gamma and lambda of 1 (the paper: 0.99 and 0.95).

    Args:
        critic: "separate", a backbone of its own that starts as the policy does, or "shared", a
            head on the policy's trunk, which then learns from both losses. Under `model.lora` a
            separate backbone is frozen too and has adapters of its own.
        critic_lr: learning rate of the critic's parameters; of the head alone if shared.
        critic_warmup: rollout steps at first in which the critic alone is trained.
        gamma, lam: discount, and lambda of the estimation; released code has 1 and 1.
        whiten_advantages: whether advantages get mean 0 and variance 1 over the rollout step.
        value_coef: weight of the critic's loss.
        value_clip: half width around the old values; null does not clip. Released code: 0.5.
    """

    scores = ("old_logprobs", "values")
    credit_scores = ("values",)
    splits_kl = True
    critic: Critic

    def __init__(
        self,
        policy: PolicyFactory,
        optimizer: OptimizerFactory,
        *,
        critic: Literal["separate", "shared"] = "separate",
        critic_lr: Positive = 1e-5,
        critic_warmup: AtLeast0 = 0,
        gamma: Share = 1.0,
        lam: Share = 1.0,
        whiten_advantages: bool = True,
        value_coef: Positive = 1.0,
        value_clip: Positive | None = 0.5,
        **shared: Any,
    ) -> None:
        super().__init__(policy, optimizer, **shared)
        self.critic_kind, self.critic_lr, self.critic_warmup = critic, critic_lr, critic_warmup
        self.gamma, self.lam, self.whiten_advantages = gamma, lam, whiten_advantages
        self.value_coef, self.value_clip = value_coef, value_clip

    def build_models(self) -> None:
        super().build_models()
        backbone = self.policy_factory().train() if self.critic_kind == "separate" else None
        self.critic = Critic(hidden_size(self.policy.get_output_embeddings()), backbone)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.critic.backbone is not None:  # which was not settled where ZeRO-3 loaded it
            set_attention(self.critic.backbone, self.policy.config._attn_implementation)

    def parameter_groups(self) -> list[dict[str, Any]]:
        (actor,) = super().parameter_groups()
        critic = [p for p in self.critic.parameters() if p.requires_grad]
        return [actor, {"name": "critic", "params": critic, "lr": self.critic_lr}]

    def policy_scores(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """Adds `values` [B, T], of the state before each response token."""
        hidden = response_hidden(self.policy, batch)
        scores = response_scores(
            self.policy, batch, self.temperature, hidden, entropy_gradient=self.entropy_gradient
        )
        values = self.critic(batch, hidden)
        return scores._asdict() | {"values": spread(values, batch.response_mask)}

    def pass_flops(self, lengths: Tensor, responses: Tensor) -> float | None:
        """Those of a critic with a backbone of its own too."""
        flops, backbone = super().pass_flops(lengths, responses), self.critic.backbone
        if flops is None or backbone is None:
            return flops
        return flops + (trunk_flops(backbone, lengths) or 0.0)

    def compute_advantages(self, rollouts: Rollouts) -> Credit:
        """Of each token, N x [L]; with `returns`, what the critic's values should have been."""
        if not len(rollouts):
            return Credit([], {"returns": []})
        lengths = rollouts.lengths
        values = pad_sequence(rollouts.scores["values"], batch_first=True)  # [N, T]
        mask = torch.arange(values.shape[1]) < lengths[:, None]
        token_rewards = torch.zeros_like(values)
        token_rewards[torch.arange(len(lengths)), lengths - 1] = rollouts.rewards
        if self.kl_in_reward:
            token_rewards -= pad_sequence(self.kl_penalties(rollouts), batch_first=True)
        credit = generalized_advantages(token_rewards, values, mask, gamma=self.gamma, lam=self.lam)

        def unpad(padded: Tensor) -> list[Tensor]:
            return [row[:n] for row, n in zip(padded, lengths.tolist(), strict=True)]

        advantages = (
            whiten(credit.advantages, mask) if self.whiten_advantages else credit.advantages
        )
        return Credit(unpad(advantages), {"returns": unpad(credit.returns)})

    def auxiliary_loss(self, scores: dict[str, Tensor], batch: RolloutBatch) -> LossOutput:
        loss_sum, metrics = value_loss(
            scores["values"], batch.values, batch.returns, batch.weights, self.value_clip
        )
        return LossOutput(self.value_coef * loss_sum, metrics)

    def idle_on_policy(self) -> dict[str, str]:
        idle = super().idle_on_policy()
        if self.updates_per_step == 1:
            idle["algo.value_clip"] = "with one update per rollout step values are the old ones"
        return idle

    @property
    def frozen_groups(self) -> tuple[str, ...]:
        return ("policy",) if self.rollout_step < self.critic_warmup else ()
