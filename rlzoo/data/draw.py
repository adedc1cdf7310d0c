"""From prompts and budgets to scored rollouts: the engine draws, the verifier judges, the ledger
books. Training, pilots and validation all draw here."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.data.shares import share_out
from rlzoo.engines.base import Engine, Request, Response, SamplingParams
from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather, world
from rlzoo.report.ledger import Ledger
from rlzoo.report.progress import Bars
from rlzoo.rewards.base import Reward, Scores, Verdict
from rlzoo.rewards.calling import RewardCaller
from rlzoo.rng import STREAMS, response_seed
from rlzoo.types import Prompt, Rollouts


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

        Seconds are booked by stream: "sampling", "verifying", and "gathering", which is waiting
        for the other ranks and putting together what all drew.

        Collective: every rank draws and scores its share of the responses, balanced by expected
        tokens (`rlzoo.data.shares`), and returns the rollouts of all.
        """
        chosen = [(p, n) for p, n in zip(prompts, budgets, strict=True) if n > 0]
        prompts, budgets = [p for p, _ in chosen], [n for _, n in chosen]
        rank, world_size = world()
        lengths = [len(p.token_ids) for p in prompts]
        mine = share_out(lengths, budgets, self.expected_length(), world_size)[rank]
        requests = []
        for i, start, stop in mine:
            key = (self.seed, stream, rollout_step, round_, prompts[i].id)
            seeds = tuple(response_seed(*key, index) for index in range(start, stop))
            requests.append(Request(prompts[i].token_ids, seeds))
        version = self.ledger.updates
        bar = self.bars.phase("sampling", sum(len(r.seeds) for r in requests), "responses")
        began = time.perf_counter()
        with self.ledger.phase(f"sampling/{stream}"), bar as advance:
            drawn = self.engine.generate(requests, self.params, version, lambda *_: advance(1))
        seconds = time.perf_counter() - began
        with self.ledger.phase(f"verifying/{stream}"):
            scored = self._score([prompts[piece.prompt] for piece in mine], drawn)
        with self.ledger.phase(f"gathering/{stream}"):
            pieces = list(zip(mine, scored, strict=True))
            parts = all_gather((pieces, seconds, self.reward.unparsed_golds))
            pairs = sorted((pair for part, *_ in parts for pair in part), key=lambda pair: pair[0])
            rollouts = assemble(prompts, budgets, [s for _, s in pairs], version, rollout_step)
        check_finite(rollouts, stream, self.engine)
        rollouts.sampling_seconds = max(seconds for _, seconds, _ in parts)  # the slowest rank's
        self._tell_unverifiable(rollouts, [i for *_, unparsed in parts for i in unparsed])
        self.ledger.drew(stream, rollouts.lengths.tolist())
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

        The ledger's, hence the same on every rank and after a resume. Means of single prompts are
        not kept: shares are no more even by them (experiments/balance).
        """
        total = {
            unit: sum(self.ledger.counts[f"{unit}/{stream}"] for stream in STREAMS)
            for unit in ("tokens", "responses")
        }
        if not total["responses"]:
            return float(self.params.max_response_tokens)
        return total["tokens"] / total["responses"]

    def _score(
        self, prompts: list[Prompt], drawn: list[list[Response]]
    ) -> list[tuple[list[Response], Scores]]:
        """Each piece's responses with their scores; `prompts[i]` is the prompt of `drawn[i]`."""
        if world()[0] == 0:
            self.reward.check_golds(self.golds_to_try)
        self.golds_to_try = []
        flat = [(p, r) for p, group in zip(prompts, drawn, strict=True) for r in group]
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        texts = [str(decode(response.token_ids)) for _, response in flat]
        bar = self.bars.phase("verifying", len(flat), "responses")
        with bar as advance:
            scores = self.reward(
                [prompt for prompt, _ in flat],
                texts,
                [response.truncated for _, response in flat],
                on_progress=increments(advance),
            )
        sizes = [len(group) for group in drawn]
        parts = zip(drawn, scores.rewards.split(sizes), scores.verdicts.split(sizes), strict=True)
        return [(group, Scores(rewards, verdicts)) for group, rewards, verdicts in parts]


def assemble(
    prompts: list[Prompt],
    budgets: list[int],
    pieces: list[tuple[list[Response], Scores]],
    policy_version: int,
    rollout_step: int,
) -> Rollouts:
    """One Rollouts from the scored pieces of all ranks, which come in order of prompt and response.

    Args:
        budgets: [P] responses of each prompt, > 0.
    """
    responses = [response for piece, _ in pieces for response in piece]
    sizes = torch.tensor(budgets, dtype=torch.long)
    nothing = torch.zeros(0)
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(len(prompts)).repeat_interleave(sizes),
        responses=[response.token_ids for response in responses],
        sampler_logprobs=[response.logprobs for response in responses],
        truncated=torch.tensor([response.truncated for response in responses], dtype=torch.bool),
        rewards=torch.cat([nothing, *(scores.rewards for _, scores in pieces)]),
        verdicts=torch.cat([nothing.to(torch.int8), *(scores.verdicts for _, scores in pieces)]),
        policy_version=policy_version,
        rollout_step=rollout_step,
        num_near_ties=sum(response.near_ties for response in responses),
    )


def check_finite(rollouts: Rollouts, stream: str, engine: Engine) -> None:
    """Raises a UserError if log-probs of the engine are NaN or inf: what it drew is then noise."""
    lost = sum(int((~logprobs.isfinite()).sum()) for logprobs in rollouts.sampler_logprobs)
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


def increments(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Turns a call with the number done so far into calls with the number newly done."""
    last = 0

    def on_progress(done: int) -> None:
        nonlocal last
        advance(done - last)
        last = done

    return on_progress
