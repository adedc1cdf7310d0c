"""Parts of a run that cost next to nothing, so that what is left is rlzoo's own: prompts that are
there at once, an engine that makes tokens up, and a policy whose log-prob of a token is a number of
that token alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlzoo.algos import GRPO
from rlzoo.engines.base import (
    OnResponse,
    Request,
    Response,
    SamplingParams,
    check_version,
    weights_checksum,
)
from rlzoo.types import Prompt, RolloutBatch

POOL = 2**20  # tokens that responses are cut from
FIRST = 260  # the first token that is a word of its own; see `_random_policies.make_tokenizer`


def scored(table: Tensor, tokens: Tensor) -> Tensor:
    """Log-probs of tokens, of the same shape: a number of each token, below 0."""
    return -1 - table[:, -1][tokens].square()


class Cheap(GRPO):
    """GRPO without a forward pass."""

    def policy_scores(self, batch: RolloutBatch) -> dict[str, Tensor]:
        table = self.policy.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        logprobs = scored(table, batch.response_ids) * batch.response_mask
        return {"logprobs": logprobs, "entropy": torch.zeros_like(logprobs)}


class MadeUp:
    """An engine whose responses have half of the longest length to all of it."""

    dtype, asleep = "float32", False

    def __init__(self, **_: object) -> None:
        self.version, self.weights = -1, dict[str, Tensor]()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in named_tensors}
        self.version = version
        table = self.weights["model.embed_tokens.weight"]
        self.pool = torch.arange(POOL) * 7919 % (len(table) - FIRST) + FIRST
        self.pool_logprobs = scored(table, self.pool)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        expected_version: int,
        on_response: OnResponse | None = None,
    ) -> list[list[Response]]:
        check_version(self, expected_version)
        longest, found = params.max_response_tokens, []
        for index, request in enumerate(requests):
            group = []
            for place, seed in enumerate(request.seeds):
                start, length = seed % (POOL - longest), longest // 2 + seed % (longest // 2 + 1)
                cut = slice(start, start + length)
                response = Response(
                    self.pool[cut], self.pool_logprobs[cut], truncated=False, near_ties=0
                )
                group.append(response)
                if on_response is not None:
                    on_response(index, place, response)
            found.append(group)
        return found

    def checksum(self) -> int:
        return weights_checksum(self.weights.items())

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        raise NotImplementedError  # the checksum tells enough, and no doctor asks

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class Encoded:
    """A template for prompts that have their tokens."""

    def encode(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        on_too_long: Literal["error", "drop"] = "error",
    ) -> list[Prompt]:
        return list(prompts)


class MadePrompts:
    """Any number of prompts of 16 tokens, at once."""

    def __init__(self, num_train: int) -> None:
        self.counts = {"train": num_train, "val": 16, "test": 16}
        self.template = Encoded()

    def load(self, split: str) -> list[Prompt]:
        digits = [tuple(256 + int(d) % 4 for d in f"{i:012d}") for i in range(1000)]
        return [
            Prompt(f"{split}{i}", f"{split}{i}", "1", token_ids=(*digits[i % 1000], 5, 6, 7, 8))
            for i in range(self.counts[split])
        ]
