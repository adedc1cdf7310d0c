"""From prompts and budgets to scored rollouts: the engine draws, the verifier judges, the ledger
books. Training, pilots and validation all draw here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rlzoo.distributed import all_gather, world
from rlzoo.engines.base import Engine, Request, Response, SamplingParams
from rlzoo.ledger import Ledger
from rlzoo.microbatching import balance
from rlzoo.progress import Bars
from rlzoo.rewards.verifier import MathReward, Scores
from rlzoo.rng import response_seed
from rlzoo.types import Prompt, Rollouts


class Drawer:
    """Draws rollouts under the current policy version.

    Args:
        engine: draws the responses; shared by every stream.
        reward: any callable of prompts, texts and truncated flags that returns Scores.
        tokenizer: decodes responses for the reward; token ids are never encoded anew.
        params: temperature and length limit.
        ledger: books every response and second.
        bars: shows progress.
        seed: of the run.
    """

    def __init__(
        self,
        engine: Engine,
        reward: MathReward,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        ledger: Ledger,
        bars: Bars,
        seed: int,
    ) -> None:
        self.engine, self.reward, self.tokenizer = engine, reward, tokenizer
        self.params, self.ledger, self.bars, self.seed = params, ledger, bars, seed

    def draw(
        self,
        prompts: Sequence[Prompt],
        budgets: Sequence[int],
        stream: str,
        rollout_step: int,
        round_: int = 0,
    ) -> Rollouts:
        """`budgets[i]` scored responses of `prompts[i]`; prompts of budget 0 are left out.

        Collective: every rank draws and scores its share of the prompts, balanced by responses,
        and returns the rollouts of all.
        """
        chosen = [(p, n) for p, n in zip(prompts, budgets, strict=True) if n > 0]
        rank, world_size = world()
        mine = sorted(balance([n for _, n in chosen], world_size)[rank])
        requests = [self._request(*chosen[i], stream, rollout_step, round_) for i in mine]
        version = self.ledger.updates
        bar = self.bars.phase("sampling", sum(len(r.seeds) for r in requests), "responses")
        with self.ledger.phase("sampling"), bar as advance:
            drawn = self.engine.generate(requests, self.params, version, advance)
        scored = self._score([chosen[i][0] for i in mine], drawn)
        groups = {i: group for part in all_gather(dict(zip(mine, scored))) for i, group in part.items()}
        rollouts = assemble([p for p, _ in chosen], groups, version, rollout_step)
        self.ledger.drew(stream, rollouts.lengths.tolist())
        return rollouts

    def text(self, response: Response) -> str:
        return self.tokenizer.decode(response.token_ids, skip_special_tokens=True)

    def _request(self, prompt: Prompt, n: int, stream: str, step: int, round_: int) -> Request:
        seeds = (response_seed(self.seed, stream, step, round_, prompt.id, i) for i in range(n))
        return Request(prompt.token_ids, tuple(seeds))

    def _score(
        self, prompts: list[Prompt], drawn: list[list[Response]]
    ) -> list[tuple[list[Response], Scores]]:
        """Each prompt's responses with their scores."""
        flat = [(p, r) for p, group in zip(prompts, drawn, strict=True) for r in group]
        texts = [self.text(response) for _, response in flat]
        bar = self.bars.phase("verifying", len(flat), "responses")
        with self.ledger.phase("verifying"), bar as advance:
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
    groups: dict[int, tuple[list[Response], Scores]],
    policy_version: int,
    rollout_step: int,
) -> Rollouts:
    """One Rollouts from the scored groups of all ranks, in order of prompt and response."""
    order = [groups[i] for i in range(len(prompts))]
    responses = [response for group, _ in order for response in group]
    sizes = torch.tensor([len(group) for group, _ in order], dtype=torch.long)
    nothing = torch.zeros(0)
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(len(prompts)).repeat_interleave(sizes),
        responses=[response.token_ids for response in responses],
        sampler_logprobs=[response.logprobs for response in responses],
        truncated=torch.tensor([response.truncated for response in responses], dtype=torch.bool),
        rewards=torch.cat([nothing, *(scores.rewards for _, scores in order)]),
        verdicts=torch.cat([nothing.to(torch.int8), *(scores.verdicts for _, scores in order)]),
        policy_version=policy_version,
        rollout_step=rollout_step,
        num_near_ties=sum(response.near_ties for response in responses),
    )


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """One Rollouts from the rounds of a rollout step, which share no prompt."""
    if len(parts) == 1:
        return parts[0]
    offsets = itertools.accumulate((len(part.prompts) for part in parts[:-1]), initial=0)
    joined = lambda name: [x for part in parts for x in getattr(part, name)]  # noqa: E731
    return dataclasses.replace(
        parts[0],
        prompts=joined("prompts"),
        group_ids=torch.cat([p.group_ids + n for p, n in zip(parts, offsets, strict=True)]),
        responses=joined("responses"),
        sampler_logprobs=joined("sampler_logprobs"),
        truncated=torch.cat([part.truncated for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
        verdicts=torch.cat([part.verdicts for part in parts]),
        num_near_ties=sum(part.num_near_ties for part in parts),
    )


def increments(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Turns a call with the number done so far into calls with the number newly done."""
    last = 0

    def on_progress(done: int) -> None:
        nonlocal last
        advance(done - last)
        last = done

    return on_progress
