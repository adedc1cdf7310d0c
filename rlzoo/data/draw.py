"""From prompts and budgets to scored rollouts: the engine draws, the verifier judges, the ledger
books. Training, pilots and validation all draw here."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.data.lengths import Lengths
from rlzoo.data.shares import Piece, share_out
from rlzoo.engines.base import Engine, Request, Response, SamplingParams
from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather, world
from rlzoo.ranks.whereabouts import HERE
from rlzoo.report.ledger import Ledger
from rlzoo.report.progress import Bars
from rlzoo.rewards.base import Reward, Scores, Verdict
from rlzoo.rewards.calling import RewardCaller
from rlzoo.rewards.feeding import Feeder
from rlzoo.rng import STREAMS, response_seed
from rlzoo.types import Prompt, Rollouts

NO_IDS = torch.zeros(0, dtype=torch.long)


class Drawer:
    """Draws rollouts under the current policy version.

    Args:
        engine: draws the responses; shared by every stream.
        reward: any callable like `rlzoo.rewards.base.Reward`; what it returns is checked.
        tokenizer: decodes responses for the reward; token ids are never encoded anew.
        params: temperature and length limit.
        ledger: books every response and second.
        bars: shows progress.
        seed: of the run.
    """

    def __init__(
        self,
        engine: Engine,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        ledger: Ledger,
        bars: Bars,
        seed: int,
    ) -> None:
        self.engine, self.reward, self.tokenizer = engine, RewardCaller(reward), tokenizer
        self.params, self.ledger, self.bars, self.seed = params, ledger, bars, seed
        self.lengths = Lengths()
        self.golds_to_try: list[Prompt] = []  # whose gold answers the first draw has checked

    def draw(
        self,
        prompts: Sequence[Prompt],
        budgets: Sequence[int],
        stream: str,
        rollout_step: int,
        round_: int = 0,
    ) -> Rollouts:
        """`budgets[i]` scored responses of `prompts[i]`; prompts of budget 0 are left out.

        The reward has each response as it finishes (`rlzoo.rewards.feeding`). Seconds are booked by
        stream: "sampling"; "verifying", which is waiting for the reward when all are drawn; and
        "gathering", which is waiting for the other ranks and putting together what all drew.

        Collective: every rank draws and scores its share of the responses, balanced by expected
        tokens (`rlzoo.data.shares`), and returns the rollouts of all.
        """
        order = self.order(prompts, budgets, stream, rollout_step, round_)
        return self.gather(order, self.sample(order))

    def order(
        self,
        prompts: Sequence[Prompt],
        budgets: Sequence[int],
        stream: str,
        rollout_step: int,
        round_: int = 0,
    ) -> Order:
        """What `draw` has to do, and this rank of it."""
        chosen = [(p, n) for p, n in zip(prompts, budgets, strict=True) if n > 0]
        prompts, budgets = [p for p, _ in chosen], [n for _, n in chosen]
        rank, world_size = world()
        lengths = [len(p.token_ids) for p in prompts]
        usual = self.expected_length()
        mine = share_out(lengths, budgets, usual, world_size)[rank]
        requests = []
        for i, start, stop in mine:
            key = (self.seed, stream, rollout_step, round_, prompts[i].id)
            seeds = tuple(response_seed(*key, index) for index in range(start, stop))
            expected = self.lengths.expected(prompts[i].id, usual)
            requests.append(Request(prompts[i].token_ids, seeds, expected))
        version = self.ledger.updates
        return Order(prompts, budgets, mine, requests, version, stream, rollout_step)

    def sample(self, order: Order, beside: bool = False) -> Share:
        """Draws and scores this rank's part of an order, without any exchange between ranks.

        Args:
            beside: whether another thread is at work, whose seconds and bars are the run's.
        """
        phase, bar = (nothing, unseen) if beside else (self.ledger.phase, self.bars.phase)
        wanted = [order.prompts[i] for i, start, stop in order.pieces for _ in range(start, stop)]
        with Feeder(self.reward, self._text, wanted, self._golds()) as feeder:
            began = time.perf_counter()
            with phase(f"sampling/{order.stream}"):
                with bar("sampling", len(wanted), "responses") as advance:
                    drawn = self._generate(order, feeder, advance)
            seconds = time.perf_counter() - began
            with phase(f"verifying/{order.stream}"):
                with bar("verifying", len(wanted), "responses") as advance:
                    scores = feeder.scores(advance)
        return Share.of(order.pieces, drawn, scores, feeder.unparsed_golds, seconds)

    def gather(self, order: Order, share: Share) -> Rollouts:
        """The rollouts of all ranks, from what each has drawn; collective."""
        with self.ledger.phase(f"gathering/{order.stream}"):
            shares = all_gather(share)
            rollouts = assemble(
                order.prompts, order.budgets, shares, order.version, order.rollout_step
            )
        check_finite(rollouts, order.stream, self.engine)
        self._tell_unverifiable(rollouts, [i for each in shares for i in each.unparsed_golds])
        self.ledger.drew(order.stream, rollouts.lengths.tolist())
        self.lengths.observe(rollouts)
        return rollouts

    def draw_in_rounds(
        self, prompts: list[Prompt], budgets: list[int], data: RolloutDataModule
    ) -> Rollouts:
        """Training rollouts; others take the place of prompts the allocator is not done with."""
        allocator, step = data.allocator, data.rollout_step
        parts = [self.draw(prompts, budgets, "train", step)]
        used = {prompt.id for prompt in prompts}
        for round_ in range(1, allocator.max_rounds):
            ids, last = [prompt.id for prompt in parts[-1].prompts], parts[-1]
            sizes = torch.bincount(last.group_ids, minlength=len(ids)).tolist()
            rewards = [part.tolist() for part in last.rewards.split(sizes)]
            allocator.observe(ids, rewards)
            fresh = data.others(used, sum(not allocator.done(i) for i in ids))
            if not fresh:
                break
            used |= {prompt.id for prompt in fresh}
            total = len(fresh) * data.responses_per_prompt
            budgets = allocator.allocate([prompt.id for prompt in fresh], total)
            parts.append(self.draw(fresh, budgets, "train", step, round_))
        return dataclasses.replace(concatenate(parts), rounds=len(parts))

    def _tell_unverifiable(self, rollouts: Rollouts, unparsed: list[str]) -> None:
        """Counts the unverifiable responses by cause, and has the first rank say what is amiss."""
        rollouts.num_unparsed_golds = len(unparsed)
        if world()[0] == 0:
            unverifiable = int((rollouts.verdicts == Verdict.UNVERIFIABLE).sum())
            self.reward.tell_unparsed(unparsed)
            self.reward.tell_limits(unverifiable - len(unparsed), len(rollouts))

    def expected_length(self) -> float:
        """Tokens of a response: the mean of all that the run drew, its limit before the first.

        The ledger's, hence the same on every rank and after a resume. Means of single prompts
        (`Lengths`) say what is drawn first: shares are no more even by them (experiments/balance).
        """
        total = {
            unit: sum(self.ledger.counts[f"{unit}/{stream}"] for stream in STREAMS)
            for unit in ("tokens", "responses")
        }
        if not total["responses"]:
            return float(self.params.max_response_tokens)
        return total["tokens"] / total["responses"]

    def _text(self, token_ids: Tensor) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _golds(self) -> list[Prompt]:
        """The prompts whose gold answers are tried, on one rank and at the first draw."""
        golds, self.golds_to_try = self.golds_to_try, []
        return golds if world()[0] == 0 else []

    def _generate(
        self, order: Order, feeder: Feeder, advance: Callable[[int], None]
    ) -> list[list[Response]]:
        sizes = [len(request.seeds) for request in order.requests]
        starts = list(itertools.accumulate(sizes, initial=0))

        def finished(request: int, index: int, response: Response) -> None:
            feeder.add(starts[request] + index, response.token_ids, response.truncated)
            advance(1)

        return self.engine.generate(order.requests, self.params, order.version, finished)


class Order(NamedTuple):
    """A draw, and what this rank does of it."""

    prompts: list[Prompt]  # that something is drawn of
    budgets: list[int]  # [P] responses of each prompt, > 0
    pieces: list[Piece]  # this rank's
    requests: list[Request]  # one for each piece
    version: int  # of the weights that draw
    stream: str  # under which it is booked
    rollout_step: int


class Share(NamedTuple):
    """What a rank drew and scored, as ranks exchange it: a few tensors that hold n responses, since
    each tensor costs 60 us to send and 70 us to receive."""

    pieces: list[Piece]  # in whose order the responses are
    lengths: Tensor  # [n] int64
    token_ids: Tensor  # [sum of lengths] int32, one response after the other
    logprobs: Tensor  # [sum of lengths] float32
    truncated: Tensor  # [n] bool
    scores: Scores
    unparsed_golds: list[str]
    num_near_ties: int
    seconds: float  # of sampling

    @classmethod
    def of(
        cls,
        pieces: list[Piece],
        drawn: list[list[Response]],
        scores: Scores,
        unparsed_golds: list[str],
        seconds: float,
    ) -> Share:
        """Of the responses `drawn[i]` of each `pieces[i]`."""
        flat = [response for group in drawn for response in group]
        return cls(
            pieces,
            torch.tensor([len(r.token_ids) for r in flat], dtype=torch.long),
            torch.cat([NO_IDS, *(r.token_ids for r in flat)]).int(),
            torch.cat([torch.zeros(0), *(r.logprobs for r in flat)]),
            torch.tensor([r.truncated for r in flat], dtype=torch.bool),
            scores,
            unparsed_golds,
            sum(r.near_ties for r in flat),
            seconds,
        )

    def responses(self) -> list[Tensor]:
        """n x [L] int64 token ids."""
        return list(self.token_ids.long().split(self.lengths.tolist()))

    def response_logprobs(self) -> list[Tensor]:
        """n x [L] float32."""
        return list(self.logprobs.split(self.lengths.tolist()))


@contextmanager
def unseen(*_: object) -> Iterator[Callable[[int], None]]:
    """A bar that is not shown; that things move on is known all the same."""
    yield lambda n: HERE.moved()


@contextmanager
def nothing(*_: object) -> Iterator[Callable[[int], None]]:
    """A phase of which nothing is booked."""
    yield lambda n: None


def assemble(
    prompts: list[Prompt],
    budgets: list[int],
    shares: list[Share],
    policy_version: int,
    rollout_step: int,
) -> Rollouts:
    """One Rollouts from the shares of all ranks, in order of prompt and response.

    Args:
        budgets: [P] responses of each prompt, > 0.
    """
    pieces = [piece for share in shares for piece in share.pieces]
    firsts = itertools.accumulate((p.stop - p.start for p in pieces), initial=0)
    placed = sorted(zip(pieces, firsts, strict=False))  # with the place of its first response
    order = [first + k for piece, first in placed for k in range(piece.stop - piece.start)]
    responses = [r for share in shares for r in share.responses()]
    logprobs = [r for share in shares for r in share.response_logprobs()]
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(len(prompts)).repeat_interleave(torch.tensor(budgets).long()),
        responses=[responses[i] for i in order],
        sampler_logprobs=[logprobs[i] for i in order],
        truncated=torch.cat([share.truncated for share in shares])[order],
        rewards=torch.cat([share.scores.rewards for share in shares])[order],
        verdicts=torch.cat([share.scores.verdicts for share in shares])[order],
        policy_version=policy_version,
        rollout_step=rollout_step,
        num_near_ties=sum(share.num_near_ties for share in shares),
        sampling_seconds=max(share.seconds for share in shares),  # the slowest rank's
    )


def check_finite(rollouts: Rollouts, stream: str, engine: Engine) -> None:
    """Raises a UserError if log-probs of the engine are NaN or inf: what it drew is then noise."""
    logprobs = torch.cat([torch.zeros(0), *rollouts.sampler_logprobs])
    lost = len(logprobs) - int(logprobs.isfinite().sum())
    if lost:
        raise UserError(
            f"The engine's log-probs are not finite: {lost} of {int(rollouts.lengths.sum())} tokens"
            f" (stream {stream}), although the weights that it was given are. Its numbers outgrow"
            f" {engine.dtype}: take engine.dtype=bfloat16 or float32 (engine=transformers:"
            " model.dtype), or look for what else is wrong with the engine with doctor=true."
        )


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """One Rollouts from the rounds of a rollout step, which share no prompt."""
    if len(parts) == 1:
        return parts[0]
    offsets = itertools.accumulate((len(part.prompts) for part in parts[:-1]), initial=0)
    return dataclasses.replace(
        parts[0],
        prompts=[prompt for part in parts for prompt in part.prompts],
        group_ids=torch.cat([p.group_ids + n for p, n in zip(parts, offsets, strict=True)]),
        responses=[x for part in parts for x in part.responses],
        sampler_logprobs=[x for part in parts for x in part.sampler_logprobs],
        truncated=torch.cat([part.truncated for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
        verdicts=torch.cat([part.verdicts for part in parts]),
        num_near_ties=sum(part.num_near_ties for part in parts),
        num_unparsed_golds=sum(part.num_unparsed_golds for part in parts),
        sampling_seconds=sum(part.sampling_seconds for part in parts),
    )
