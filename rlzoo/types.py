"""What flows through rlzoo: a Prompt, a rollout step (Rollouts), a microbatch (RolloutBatch).

Letters in shapes: P prompts, N rollouts of a rollout step, B rollouts of a microbatch, T response
tokens (padded), S prompt plus response tokens (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlzoo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:  # the verifier's workers read this file too, and need not wait for transformers
    PreTrainedModel = nn.Module

PolicyFactory = Callable[[], PreTrainedModel]
OptimizerFactory = Callable[[Iterable], torch.optim.Optimizer]


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
    tags: dict = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    turns: tuple[dict, ...] | None = None


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
    weights: Tensor | None = None  # [N] float32, what each counts for in the loss; None is 1
    scores: dict[str, list[Tensor]] = field(default_factory=dict)  # name -> N x [L] float32, of
    # the trainer's models: old_logprobs, ref_logprobs, values, returns, or an algorithm's own; a
    # name that nothing computed is absent, a rollout that was not scored has an empty tensor

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> Tensor:
        """[N] int64, response tokens."""
        return torch.tensor([len(r) for r in self.responses], dtype=torch.long)

    def num_tokens(self, i: int) -> int:
        """Tokens of rollout i, its prompt included."""
        return len(self.prompts[int(self.group_ids[i])].token_ids) + len(self.responses[i])


class NoSuchScore(UserError, AttributeError):
    """A loss reads a score that its algorithm has not declared."""


class RolloutBatch:
    """A microbatch: the rollouts of one `training_step` call.

    A plain class with `.to()`, because precision plugins cast dataclasses and tensors to half
    precision, `old_logprobs` included. A microbatch with no rollout still has one row, of weight 0
    and mask False, so that its zero loss hangs on the graph.

    Beside the tensors that every microbatch has, it holds a [B, T] float32 for each score that was
    computed, by the name it has in `Rollouts.scores`. One that was not is an error to read: a zero
    in its place would be a log-prob of 1 for every token.

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
    SCORES = (  # those of rlzoo's own algorithms; others may come beside them
        "old_logprobs",  # [B, T] float32 nats
        "ref_logprobs",  # [B, T] float32 nats
        "values",  # [B, T] float32, of the critic when the rollouts were scored
        "returns",  # [B, T] float32, targets of the critic
    )
    TENSORS = ALWAYS + SCORES
    input_ids: Tensor
    prompt_lengths: Tensor
    response_ids: Tensor
    response_mask: Tensor
    weights: Tensor
    advantages: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    returns: Tensor

    def __init__(self, tensors: dict[str, Tensor], divisor: float, last: bool = False) -> None:
        self.__dict__.update(tensors)
        self.divisor = divisor  # sum of the optimizer step's weights, all microbatches and ranks
        self.last = last  # the last microbatch of its rollout step
        self.pieces = 1  # forward passes it is computed in, the same on every rank

    def __getattr__(self, name: str) -> Tensor:
        """Called for what is not there."""
        if name.startswith("_"):
            raise AttributeError(name)  # copying and pickling ask for such names
        held = ", ".join(n for n in self.tensors() if n not in self.ALWAYS) or "none"
        raise NoSuchScore(
            f"The loss reads batch.{name}, but nothing computed it for this rollout step (scores at"
            f" hand: {held}). An algorithm declares what it reads: needs_old_logprobs for"
            " old_logprobs, needs_reference_always or algo.kl_coef > 0 for ref_logprobs, extra_scores"
            " and a score_batch of its own for any other (docs/extending.md)."
        )

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, **_: object) -> RolloutBatch:
        return self.replaced(**{name: t.to(device) for name, t in self.tensors().items()})

    def replaced(self, **tensors: Tensor) -> RolloutBatch:
        """The same microbatch but for some tensors."""
        batch = RolloutBatch(self.tensors() | tensors, self.divisor, self.last)
        batch.pieces = self.pieces
        return batch

    def pieces_needed(self, max_tokens: int) -> int:
        """Pieces of at most `max_tokens` tokens each (one row at least) that this one makes."""
        rows, width = self.input_ids.shape
        return -(-rows // max(1, max_tokens // width))

    def row_slices(self, max_tokens: int) -> list[slice]:
        """Runs of rows to compute apart: as many as are needed, or as `pieces` says if more."""
        pieces = max(self.pieces, self.pieces_needed(max_tokens))
        rows = max(pieces, len(self.input_ids))
        return [slice(i * rows // pieces, (i + 1) * rows // pieces) for i in range(pieces)]

    def with_rows(self, rows: int) -> RolloutBatch:
        """The same microbatch with blank rows below, of weight 0, so that it has `rows` at least."""
        extra = max(0, rows - len(self.input_ids))
        blank = lambda t: torch.cat([t, t.new_zeros(extra, *t.shape[1:])])  # noqa: E731
        return self.replaced(**{name: blank(tensor) for name, tensor in self.tensors().items()})
