"""Metrics that mean the same on any number of ranks: avg@k, pass@k and weighted means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather
from rlzoo.rewards.base import is_right


def _add_sum(metric: Metric, name: str, *shape: int) -> None:
    """Gives `metric` a float64 sum over ranks; a tensor of its own, since += works in place."""
    metric.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")


class PassMetrics(Metric):
    """avg@n and pass@k over prompts, from the rewards of whole groups.

    A response is correct when it has the full reward of 1 (`rlzoo.rewards.base.is_right`), so
    rewards of 0/1 and of -1/+1 read alike.
    Groups may have any sizes. A group of n responses counts for pass@k only where n >= k: with
    fewer, the unbiased estimator 1 - C(n - c, k) / C(n, k) of arXiv:2107.03374 does not exist.

    All states are float64 sums, so ranks add up exactly and a rank without prompts adds nothing;
    every rank has to call `compute`.

    Args:
        ks: the k of each pass@k wanted, all at least 1.

    Raises:
        UserError: `ks` holds a number below 1.
    """

    full_state_update = False
    higher_is_better = True
    pass_sum: Tensor  # [K], of each k of `ks`
    pass_prompts: Tensor  # [K]
    avg_sum: Tensor
    avg_square_sum: Tensor
    num_prompts: Tensor

    def __init__(self, ks: Sequence[int] = (1, 2, 4, 8)) -> None:
        super().__init__()
        if any(k < 1 for k in ks):
            raise UserError(f"ks must all be at least 1, got {list(ks)}: pass@k draws k responses.")
        self.ks = tuple(ks)
        _add_sum(self, "pass_sum", len(self.ks))
        _add_sum(self, "pass_prompts", len(self.ks))
        _add_sum(self, "avg_sum")
        _add_sum(self, "avg_square_sum")
        _add_sum(self, "num_prompts")

    def update(self, rewards: Tensor, group_ids: Tensor) -> None:
        """Adds whole groups.

        Args:
            rewards: [N] one per response; 1 is correct.
            group_ids: [N] integers, equal within a group; in any order. A group split over two
                calls would count as two prompts.
        """
        if not rewards.isfinite().all():
            raise UserError("Rewards are not finite, so that nobody can say how many are right.")
        _, group = group_ids.unique(return_inverse=True)  # [N] in [0, P)
        num_responses = group.bincount().double()  # [P]
        num_correct = group.bincount(weights=is_right(rewards).double())  # [P]
        correctness = num_correct / num_responses
        self.avg_sum += correctness.sum()
        self.avg_square_sum += correctness.square().sum()
        self.num_prompts += len(num_responses)
        for i, k in enumerate(self.ks):
            enough = num_responses >= k
            self.pass_sum[i] += pass_at_k(num_responses[enough], num_correct[enough], k).sum()
            self.pass_prompts[i] += enough.sum()

    def compute(self) -> dict[str, float]:
        """The figures over all ranks; NaN where no prompt defines one.

        Returns:
            `avg_at_n`: mean over prompts of the share of correct responses, in [0, 1];
            `avg_stderr`: its standard error over prompts (NaN below two prompts);
            `pass_at_K` for each k: mean over the prompts with at least k responses, in [0, 1];
            `num_prompts`: int.
        """
        n = self.num_prompts
        variance = (self.avg_square_sum - self.avg_sum.square() / n).clamp(min=0) / (n - 1)
        stderr = (variance / n).sqrt() if n > 1 else torch.nan
        passes = (self.pass_sum / self.pass_prompts).tolist()
        return {
            "avg_at_n": float(self.avg_sum / n),
            "avg_stderr": float(stderr),
            **{f"pass_at_{k}": passed for k, passed in zip(self.ks, passes, strict=True)},
            "num_prompts": int(n),
        }


def pass_at_k(num_responses: Tensor, num_correct: Tensor, k: int) -> Tensor:
    """Unbiased chance that k of a prompt's responses, drawn at random, hold a correct one.

    Args:
        num_responses: [P] float64, each at least k.
        num_correct: [P] float64, each at most num_responses.
        k: responses drawn.

    Returns:
        [P] float64, 1 - C(n - c, k) / C(n, k).
    """
    num_wrong = num_responses - num_correct
    all_wrong = (_log_falling(num_wrong, k) - _log_falling(num_responses, k)).exp()
    return 1 - torch.where(num_wrong >= k, all_wrong, 0.0)


def _log_falling(n: Tensor, k: int) -> Tensor:
    """log(n! / (n - k)!) for n >= k, [P]; finite and meaningless below."""
    return torch.lgamma(n + 1) - torch.lgamma((n - k).clamp(min=0) + 1)


class WeightedMeans:
    """Weighted means by name, such as token means of what a loss reports.

    Each is kept as a float64 weighted sum and a float64 sum of weights, so a NaN stays visible and
    weights always count (torchmetrics' MeanMetric, 1.9.0, drops one or ignores the other). Names
    appear with their first `update` and stay, `reset` or not. Ranks may hold other names, or the
    same ones in another order: a name that a rank or a microbatch lacks has no weight there.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # by name: [2] float64, weighted sum and weight

    def update(self, sums: dict[str, Tensor], weight: Tensor) -> None:
        """Adds a microbatch.

        Args:
            sums: name to weighted sum, each []; never means.
            weight: [] sum of the weights behind every one of them; 0 changes nothing.
        """
        weight = weight.detach().double()
        for name, weighted_sum in sums.items():
            value = torch.as_tensor(weighted_sum, device=weight.device).detach().double()
            added = torch.stack([torch.where(weight != 0, value, 0.0), weight])
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def compute(self) -> dict[str, float]:
        """Each name's mean over all ranks, names in sorted order; NaN if it got no weight.

        Collective: one exchange of names and sums together, whatever each rank holds.
        """
        names = list(self._sums)
        mine = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        ranks = all_gather(dict(zip(names, mine, strict=True)))
        nothing = [0.0, 0.0]
        means = {}
        for name in sorted({name for rank in ranks for name in rank}):
            found = torch.tensor([rank.get(name, nothing) for rank in ranks], dtype=torch.float64)
            total, weight = found.sum(0)
            means[name] = float(total / weight)
        return means

    def reset(self) -> None:
        """Forgets all sums and weights, not the names."""
        self._sums = {name: torch.zeros_like(sums) for name, sums in self._sums.items()}
