from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from rlzoo.callbacks.replan import Replan
from rlzoo.errors import UserError
from rlzoo.gradnorms import head_gradient_norm
from rlzoo.logprobs import response_hidden
from rlzoo.microbatching import Plan, balance, collate
from rlzoo.selection import correct
from rlzoo.types import Prompt, Rollouts


class GVM(Replan):
    """Gradient Variance Minimization (arXiv:2505.02391, Algorithm 2): pilots before each plan.

    Draws pilots of every prompt of the epoch under the current policy, takes from them the
    acceptance rate p_i and the mean gradient norm G_i of correct pilots (zero if there is none),
    and lets the allocator share out the epoch's budget. Pilots are paid from the ledger and then
    discarded. Departs from released code: G_i is the norm at the output head, in closed form, not
    at the input embedding by a backward pass.

    Args:
        run_dir: see Replan.
        pilots: responses per prompt, N' in the paper.
        max_tokens: of one forward pass over pilots; bounds memory.
    """

    def __init__(self, run_dir: str, pilots: int = 8, max_tokens: int = 16384) -> None:
        super().__init__(run_dir)
        if pilots < 1:
            raise UserError(f"sampler.callback.pilots must be at least 1, got {pilots}.")
        self.pilots, self.max_tokens = pilots, max_tokens

    def observe(
        self, trainer: Trainer, pl_module: LightningModule, prompts: list[Prompt]
    ) -> dict[str, list[float]]:
        data = trainer.datamodule
        rollouts = data.drawer.draw(prompts, [self.pilots] * len(prompts), "pilot", data.rollout_step)
        accepted = correct(rollouts.rewards)
        with data.ledger.phase("planning"):
            norms = gradient_norms(
                pl_module.policy,
                rollouts,
                accepted.nonzero()[:, 0].tolist(),
                temperature=data.drawer.params.temperature,
                max_tokens=self.max_tokens,
            )
            sizes = [self.pilots] * len(prompts)
            hits = accepted.float().split(sizes)
            sums = torch.zeros(len(rollouts)).index_add(0, accepted.nonzero()[:, 0], norms)
            mean_norms = [
                float(total.sum() / max(1.0, float(hit.sum())))
                for total, hit in zip(sums.split(sizes), hits, strict=True)
            ]
            data.allocator.observe(
                [prompt.id for prompt in prompts],
                [hit.tolist() for hit in hits],
                [length.tolist() for length in rollouts.lengths.split(sizes)],
                mean_norms,
            )
        accept_rates = [float(hit.mean()) for hit in hits]
        data.row["pilot/accept_rate"] = sum(accept_rates) / len(accept_rates)
        return {"accept_rate": accept_rates, "grad_norm": mean_norms}


@torch.no_grad()
def gradient_norms(
    policy: torch.nn.Module,
    rollouts: Rollouts,
    indices: list[int],
    *,
    temperature: float,
    max_tokens: int,
) -> Tensor:
    """[len(indices)] head gradient norm of each named rollout's summed log-prob (algorithms.md 2.2).

    Forward passes only, over rollouts of similar length together.
    """
    norms = torch.zeros(len(indices))
    head = policy.get_output_embeddings()
    device = head.weight.device
    costs = [
        len(rollouts.responses[i]) + len(rollouts.prompts[int(rollouts.group_ids[i])].token_ids)
        for i in indices
    ]
    for part in balance(costs, -(-sum(costs) // max_tokens)) if indices else []:
        plan = Plan([indices[j] for j in part], torch.ones(len(part)), 1.0)
        batch = collate(rollouts, plan, pad_token_id=0).to(device)
        lengths = batch.response_mask.sum(-1).tolist()
        tokens = batch.response_ids[batch.response_mask].split(lengths)
        for j, hidden, token in zip(part, response_hidden(policy, batch).split(lengths), tokens):
            bias = getattr(head, "bias", None)
            norms[j] = head_gradient_norm(hidden, head.weight, token, temperature, bias).cpu()
    return norms
