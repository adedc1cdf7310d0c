from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.callbacks.replan import Replan
from rlzoo.callbacks.state import Run
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.learning.microbatching import of_like_length
from rlzoo.learning.selection import correct
from rlzoo.models.gather import gathered_in_place, through
from rlzoo.models.gradnorms import head_gradient_norms
from rlzoo.models.logits import transform_of
from rlzoo.models.logprobs import response_hidden
from rlzoo.ranks.exchange import all_gather, world
from rlzoo.types import Prompt, RolloutBatch, Rollouts, collate
from rlzoo.values import AtLeast1, PathText


class GVM(Replan):
    """Gradient Variance Minimization (arXiv:2505.02391, Algorithm 2): pilots before each plan.

    Draws pilots of every prompt of the epoch under the current policy, takes from them the
    acceptance rate p_i and the mean gradient norm G_i of correct pilots (zero if there is none),
    and lets the allocator share out the epoch's budget. Pilots are paid from the ledger and then
    discarded. Departs from released code: G_i is the norm at the output head, in closed form, not
    at the input embedding by a backward pass.

    The engine sleeps while norms are computed, which take the room of logits on the same device;
    the loop wakes it before the epoch's first draw.

    Args:
        run_dir: see Replan.
        pilots: responses per prompt, N' in the paper.
    """

    uses_engine = True

    def __init__(self, run_dir: PathText, pilots: AtLeast1 = 8) -> None:
        super().__init__(run_dir)
        self.pilots = pilots

    def observe(
        self, run: Run, data: RolloutDataModule, algo: PolicyAlgorithm, prompts: list[Prompt]
    ) -> dict[str, list[float]]:
        sizes = [self.pilots] * len(prompts)
        rollouts = run.drawer.draw(prompts, sizes, "pilot", data.rollout_step)
        run.engine.sleep()
        with run.ledger.phase("planning"):
            accept_rates, mean_norms = self.learn(data, algo, rollouts, prompts)
        run.row["pilot/accept_rate"] = sum(accept_rates) / len(accept_rates)
        return {"accept_rate": accept_rates, "grad_norm": mean_norms}

    def learn(
        self,
        data: RolloutDataModule,
        algo: PolicyAlgorithm,
        rollouts: Rollouts,
        prompts: list[Prompt],
    ) -> tuple[list[float], list[float]]:
        """Tells the allocator of the pilots; acceptance rate and mean norm of each prompt."""
        sizes = [self.pilots] * len(prompts)
        accepted = correct(rollouts.rewards)
        hits = accepted.float().split(sizes)
        indices = accepted.nonzero()[:, 0]
        with algo.trainer.precision_plugin.forward_context():  # as in training
            norms = gradient_norms(
                algo.policy,
                rollouts,
                indices.tolist(),
                temperature=data.params.temperature,
                max_tokens=algo.tokens_per_microbatch,
            )
        sums = torch.zeros(len(rollouts)).index_add(0, indices, norms)
        mean_norms = [
            float(total.sum() / max(1.0, float(hit.sum())))
            for total, hit in zip(sums.split(sizes), hits, strict=True)
        ]
        data.allocator.observe(
            [prompt.id for prompt in prompts],
            [hit.tolist() for hit in hits],
            mean_norms,
        )
        return [float(hit.mean()) for hit in hits], mean_norms


@torch.no_grad()
def gradient_norms(
    policy: PreTrainedModel,
    rollouts: Rollouts,
    indices: list[int],
    *,
    temperature: float,
    max_tokens: int,
) -> Tensor:
    """[len(indices)] head gradient norm of each rollout's summed log-prob (docs/formulas.md 9.2).

    Forward passes only, over rollouts of similar length together. Collective: every rank takes its
    share of the rollouts, in as many passes as the others, and returns the norms of all.
    """
    rank, world_size = world()
    device = policy.get_output_embeddings().weight.device
    mine: dict[int, float] = {}
    for members in of_like_length(rollouts, indices, max_tokens, world_size)[rank::world_size]:
        batch = collate(rollouts.rows(members)).to(device)
        norms = through(policy, head_norms, policy, batch, temperature)
        mine |= dict(zip(members, norms.tolist(), strict=False))  # where blank, one row more
    found = {i: norm for part in all_gather(mine) for i, norm in part.items()}
    return torch.tensor([found[i] for i in indices], dtype=torch.float32)


def head_norms(policy: PreTrainedModel, batch: RolloutBatch, temperature: float) -> Tensor:
    """[B] head gradient norm of each row's response."""
    head = policy.get_output_embeddings()
    lengths = batch.response_mask.sum(-1).tolist()
    tokens = batch.response_ids[batch.response_mask].split(lengths)
    hidden = response_hidden(policy, batch).split(lengths)
    with gathered_in_place(head.parameters()):
        bias, transform = getattr(head, "bias", None), transform_of(policy)
        return head_gradient_norms(hidden, head.weight, tokens, temperature, bias, transform)
