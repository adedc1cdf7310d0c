"""What flows through rlzoo: a Prompt, a rollout step (Rollouts), its Credit, a microbatch
(RolloutBatch).

Letters in shapes: P prompts, N rollouts of a rollout step, B rollouts of a microbatch, T response
tokens (padded), S prompt plus response tokens (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rlzoo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:  # the verifier's workers read this file too, and need not wait for transformers
    PreTrainedModel = nn.Module

PolicyFactory = Callable[[], PreTrainedModel]
OptimizerFactory = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Prompt:
    """One question with its gold answer.

    Attributes:
        id: stable across runs, splits, filters and shuffles; budgets are keyed by it.
        question: text of the user turn, before any template.
        answer: gold answer as text, without a box.
        solution: a worked solution, if the data has one (what `algo=sft` trains on).
        tags: anything to group results by, such as family and level.
        token_ids: the rendered prompt; empty until a template has encoded it.
        turns: the whole chat, role and content of each, where the data gives one; `question` is
            then its text, and no template adds anything.
    """

    id: str
    question: str
    answer: str
    solution: str | None = None
    tags: dict[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    turns: tuple[dict[str, Any], ...] | None = None


@dataclass
class Rollouts:
    """All rollouts drawn in one rollout step (or one round of pilots, or one validation).

    The responses of a prompt are its group; groups are ragged. After `draw`, every rank holds the
    same Rollouts in the same order, so that whatever is decided from them is decided alike.
    """

    prompts: list[Prompt]  # P, distinct
    group_ids: Tensor  # [N] int64, index into prompts
    responses: list[Tensor]  # N x [L] int64 token ids
    sampler_logprobs: list[Tensor]  # N x [L] float32 nats, as the engine reports them
    truncated: Tensor  # [N] bool
    rewards: Tensor  # [N] float32
    verdicts: Tensor  # [N] int8, rlzoo.rewards.math.Verdict
    policy_version: int
    rollout_step: int
    num_near_ties: int = 0  # tokens that rounding may decide
    num_unparsed_golds: int = 0  # responses that are unverifiable for their gold answer's sake
    sampling_seconds: float = 0.0  # that the slowest rank took to draw them; 0 if none did
    rounds: int = 1  # draws that they took
    replayed: bool = False  # read from a file, not drawn by this run
    lag: int = 0  # updates made between their draw and their training
    weights: Tensor | None = None  # [N] float32, what each counts for in the loss; None is 1
    selected: Tensor | None = None  # [N] bool, which train, once `training_units` has asked
    scores: dict[str, list[Tensor]] = field(default_factory=dict)  # name -> N x [L] float32, of
    # the trainer's models: old_logprobs, ref_logprobs, values, or an algorithm's own; a name that
    # nothing computed is absent, a rollout that was not scored has an empty tensor

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> Tensor:
        """[N] int64, response tokens."""
        return torch.tensor([len(r) for r in self.responses], dtype=torch.long)

    @property
    def comparable(self) -> bool:
        """Whether what the engine says of them is of the weights that they are to train."""
        return not self.replayed and self.lag == 0

    def num_tokens(self, i: int) -> int:
        """Tokens of rollout i, its prompt included."""
        return len(self.prompts[int(self.group_ids[i])].token_ids) + len(self.responses[i])

    def rows(self, indices: Iterable[int] | None = None) -> list[BatchRow]:
        """Some of the rollouts, or all, as a microbatch takes them; without their scores."""
        return [
            BatchRow(
                self.prompts[int(self.group_ids[i])].token_ids,
                self.responses[i],
                {"sampler_logprobs": self.sampler_logprobs[i]},
            )
            for i in (range(len(self)) if indices is None else indices)
        ]


class BatchRow(NamedTuple):
    """One prompt with one response, as `collate` takes it."""

    prompt_ids: Sequence[int]
    response_ids: Tensor  # [L] int64
    tokens: Mapping[str, Tensor | float] = {}  # [L] float32 or one value for all, by name


class Credit(NamedTuple):
    """What a rollout step's rollouts are worth."""

    advantages: Tensor | Sequence[Tensor]  # [N] of each rollout, or N x [L] of each token
    targets: Mapping[str, Sequence[Tensor]] = {}  # N x [L] by name, for the loss to read


class NoSuchScore(UserError, AttributeError):
    """A loss reads a score that its algorithm has not declared, or nothing computes one that is."""


class RolloutBatch:
    """A microbatch: the rollouts of one `training_step` call.

    A plain class with `.to()`, because precision plugins cast dataclasses and tensors to half
    precision, `old_logprobs` included. A microbatch with no rollout still has one row, of weight 0
    and mask False, so that its zero loss hangs on the graph.

    Beside the tensors that every microbatch has, it holds a [B, T] float32 for each score that was
    computed, by the name it has in `Rollouts.scores`, and for each of `Credit.targets`. One that
    was not is an error to read: a zero in its place would be a log-prob of 1 for every token.

    Raises:
        NoSuchScore: from reading a score that was not computed.
    """

    ALWAYS = (
        "input_ids",  # [B, S] int64, prompt then response, padded on the right
        "prompt_lengths",  # [B] int64
        "response_ids",  # [B, T] int64, padded on the right
        "response_mask",  # [B, T] bool, end-of-sequence token included
        "weights",  # [B, T] float32, 0 off the response
        "advantages",  # [B, T] float32
        "sampler_logprobs",  # [B, T] float32 nats
    )

    def __init__(self, tensors: dict[str, Tensor], divisor: float) -> None:
        self.__dict__.update(tensors)
        self.divisor = divisor  # sum of the optimizer step's weights, all microbatches and ranks

    def __getattr__(self, name: str) -> Tensor:
        """Called for what is not there."""
        if name.startswith("_"):
            raise AttributeError(name)  # copying and pickling ask for such names
        held = ", ".join(n for n in self.tensors() if n not in self.ALWAYS) or "none"
        raise NoSuchScore(
            f"The loss reads batch.{name}, but nothing computed it for this rollout step (scores at"
            f" hand: {held}). An algorithm declares what it reads in `scores`, such as"
            ' scores = ("old_logprobs", "entropy"); algo.kl_coef > 0 declares ref_logprobs'
            " (docs/extending.md)."
        )

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, **_: object) -> RolloutBatch:
        return self.replaced(**{name: t.to(device) for name, t in self.tensors().items()})

    def replaced(self, **tensors: Tensor) -> RolloutBatch:
        """The same microbatch but for some tensors."""
        return RolloutBatch(self.tensors() | tensors, self.divisor)


class Update:
    """An optimizer step's microbatches on this rank, as many as on any other: what Lightning takes
    for a batch.

    Attributes:
        place: of the update in its rollout step, from 0.
        last: whether it ends its rollout step.
        first, ends: of a part of an update, the place of its first microbatch, and whether it is
            the last part.
    """

    def __init__(
        self,
        microbatches: Sequence[RolloutBatch],
        place: int = 0,
        last: bool = False,
        first: int = 0,
        ends: bool = True,
    ) -> None:
        self.microbatches, self.place, self.last = list(microbatches), place, last
        self.first, self.ends = first, ends

    def to(self, *_: object, **__: object) -> Update:
        """Itself: each microbatch goes to the device when its turn comes."""
        return self

    def parts(self) -> list[Update]:
        """Updates of one microbatch each, of which the last alone may end the rollout step."""
        count = len(self.microbatches)
        return [
            Update([batch], self.place, self.last and i == count - 1, i, i == count - 1)
            for i, batch in enumerate(self.microbatches)
        ]


def collate(
    rows: Sequence[BatchRow], pad_token_id: int = 0, divisor: float = 1.0, names: Iterable[str] = ()
) -> RolloutBatch:
    """Pads rows into a microbatch; no row makes a blank one.

    Args:
        divisor: of the optimizer step, see `RolloutBatch`.
        names: of per-token values that it has even where no row does. A weight that is not given
            is 1 on the response, anything else 0.
    """
    count = max(1, len(rows))
    width = max((len(row.response_ids) for row in rows), default=1)
    total = max((len(row.prompt_ids) + len(row.response_ids) for row in rows), default=2)
    found = (name for row in rows for name in row.tokens)
    per_token = ("weights", "advantages", "sampler_logprobs", *names, *found)
    tensors = {name: torch.zeros(count, width) for name in dict.fromkeys(per_token)} | {
        "input_ids": torch.full((count, total), pad_token_id),
        "prompt_lengths": torch.ones(count, dtype=torch.long),
        "response_ids": torch.full((count, width), pad_token_id),
        "response_mask": torch.zeros(count, width, dtype=torch.bool),
    }
    for i, row in enumerate(rows):
        start, length = len(row.prompt_ids), len(row.response_ids)
        tensors["input_ids"][i, :start] = torch.tensor(row.prompt_ids)
        tensors["input_ids"][i, start : start + length] = row.response_ids
        tensors["prompt_lengths"][i] = start
        tensors["response_ids"][i, :length] = row.response_ids
        tensors["response_mask"][i, :length] = True
        for name, values in {"weights": 1.0, **row.tokens}.items():
            tensors[name][i, :length] = values
    return RolloutBatch(tensors, divisor)
