"""`engine=transformers` against transformers' own `model.generate`, on responses of skewed lengths.

    python -m rlzoo.bench sampling [--shape 25m] [--responses 256] [--longest 192] [--repeats 5]

Both draw the same number of responses of the same random policy from the same prompts, eight of
each, at temperature 1, in one batch of all of them, one after the other in this process. Lengths
are given, since a random policy has none of its own: log-normal, with the median at 22% of the
longest and 3% cut there, which is how responses of reasoning models are spread. Each side is told
to end a response at its length, `generate` by a stopping criterion, the engine where it looks for
end tokens. The last line is JSON with
    tokens_per_second_ratio: of the engine over `generate`, median of pairs; _low, _high: least and
        largest pair;
    outside_share: of the engine's time that is not spent in backbone and head;
    peak_bytes, generate_peak_bytes: tensors that lived at once, above the weights;
    step_ms, trunk_ms, head_ms, draw_ms, rest_ms: of one of the engine's `steps` (passes of its
        trunk), on average.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from rlzoo.bench._interleaved import figures, interleaved, ratio
from rlzoo.bench._live import peak_bytes
from rlzoo.bench._random_policies import SHAPES, make_policy
from rlzoo.engines import drawing
from rlzoo.engines import transformers as engine_module
from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.rows import Rows
from rlzoo.engines.transformers import TransformersEngine

EACH = 8  # responses of a prompt
PROMPT = (16, 48)  # tokens of a prompt, from and to
MEDIAN_SHARE, SPREAD = 688 / 3072, 0.77  # of the longest; sigma of the logarithm
PAD = 1


def lengths_of(responses: int, longest: int) -> np.ndarray:
    """Tokens of each response, always the same."""
    normal = np.random.Generator(np.random.Philox(key=2)).normal(0.0, SPREAD, responses)
    drawn = np.rint(longest * MEDIAN_SHARE * np.exp(normal))
    return drawn.clip(1, longest).astype(int)


def prompts_of(count: int, vocabulary: int) -> list[tuple[int, ...]]:
    draw = np.random.Generator(np.random.Philox(key=3))
    sizes = draw.integers(PROMPT[0], PROMPT[1] + 1, count)
    return [tuple(draw.integers(4, vocabulary, size).tolist()) for size in sizes]


class GivenLengths(StoppingCriteria):
    """Ends each row of a batch at its own length."""

    def __init__(self, prompt: int, lengths: np.ndarray) -> None:
        self.ends = torch.from_numpy(lengths) + prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return self.ends <= input_ids.shape[1]


def rows_of(lengths: np.ndarray) -> type[Rows]:
    """Rows that end at given lengths, whatever their tokens."""
    ends = torch.from_numpy(lengths)

    class GivenRows(Rows):
        def stops(self, places: Tensor, token: Tensor) -> Tensor:
            owners = [self.owner[place] for place in places.tolist()]
            wanted = torch.tensor([owner.request * EACH + owner.number for owner in owners])
            return self.lengths[places] == ends[wanted]

    return GivenRows


class Sides:
    """One policy, drawn from by both.

    Args:
        shape: of the policy.
        responses: in all, in one batch.
        longest: tokens of a response.
    """

    def __init__(self, shape: str, responses: int, longest: int) -> None:
        self.model = make_policy(shape)
        self.lengths, self.longest = lengths_of(responses, longest), longest
        self.prompts = prompts_of(responses // EACH, self.model.config.vocab_size)
        self.engine = TransformersEngine(lambda: make_policy(shape), [0], PAD, responses)
        self.engine.load_weights(self.model.named_parameters(), 0)

    def generate(self) -> int:
        """Tokens that `model.generate` drew."""
        width = max(map(len, self.prompts))
        padded = [[PAD] * (width - len(p)) + list(p) for p in self.prompts for _ in range(EACH)]
        ids = torch.tensor(padded)
        generate: Any = self.model.generate
        with torch.inference_mode():
            drawn = generate(
                ids,
                attention_mask=(ids != PAD).long(),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.longest,
                eos_token_id=None,
                pad_token_id=PAD,
                stopping_criteria=StoppingCriteriaList([GivenLengths(width, self.lengths)]),
            )
        assert drawn.shape == (len(self.lengths), width + self.lengths.max())
        return int(self.lengths.sum())

    def draw(self) -> int:
        """Tokens that the engine drew."""
        seeds = [tuple(range(i * EACH, (i + 1) * EACH)) for i in range(len(self.prompts))]
        requests = [Request(p, s) for p, s in zip(self.prompts, seeds, strict=True)]
        with patch.object(engine_module, "Rows", rows_of(self.lengths)):
            drawn = self.engine.generate(requests, SamplingParams(1.0, self.longest), 0)
        found = [len(response.token_ids) for group in drawn for response in group]
        assert found == self.lengths.tolist()
        return sum(found)


@contextmanager
def timed(engine: TransformersEngine) -> Iterator[dict[str, float]]:
    """Seconds of the engine's parts, and its decoding steps, while it is on."""
    found: dict[str, float] = defaultdict(float)
    began: list[float] = []

    def start(*_: object) -> None:
        began.append(time.perf_counter())

    def watch(name: str, module: nn.Module) -> None:
        def end(*_: object) -> None:
            found[name] += time.perf_counter() - began.pop()
            found["steps"] += name == "trunk"

        handles.append(module.register_forward_pre_hook(start))
        handles.append(module.register_forward_hook(end))

    def draw(*arguments: Any) -> Any:
        start()
        drawn = drawing.draw(*arguments)
        found["draw"] += time.perf_counter() - began.pop()
        return drawn

    handles: list[Any] = []
    watch("trunk", engine.model.base_model)
    watch("head", engine.model.get_output_embeddings())
    with patch.object(engine_module, "draw", draw):
        start()
        yield found
        found["all"] = time.perf_counter() - began.pop()
    for handle in handles:
        handle.remove()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlzoo.bench sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--responses", type=int, default=256, help="a multiple of eight")
    parser.add_argument("--longest", type=int, default=192, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args(argv)
    sides = Sides(asked.shape, asked.responses, asked.longest)
    tokens = int(sides.lengths.sum())
    print(
        f"{asked.shape}: {len(sides.lengths)} responses, {tokens} tokens, median"
        f" {median(sides.lengths.tolist())}, longest {sides.lengths.max()}",
        flush=True,
    )
    seconds = interleaved({"generate": sides.generate, "engine": sides.draw}, asked.repeats)
    for name, values in seconds.items():
        print(f"{name}: {tokens / median(values):.0f} tokens a second", flush=True)
    with timed(sides.engine) as found:
        sides.draw()
    parts = {name: found[name] for name in ("trunk", "head", "draw")}
    parts["rest"] = found["all"] - sum(parts.values())
    result = figures("tokens_per_second_ratio", ratio(seconds["generate"], seconds["engine"]))
    result |= {
        "outside_share": round((parts["draw"] + parts["rest"]) / found["all"], 4),
        "peak_bytes": peak_bytes(sides.draw),
        "generate_peak_bytes": peak_bytes(sides.generate),
        "steps": found["steps"],
        "step_ms": round(1e3 * found["all"] / found["steps"], 2),
    }
    result |= {f"{k}_ms": round(1e3 * v / found["steps"], 2) for k, v in parts.items()}
    result |= {"shape": asked.shape, "responses": asked.responses, "longest": asked.longest}
    print(json.dumps(result))
