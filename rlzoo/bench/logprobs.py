"""Log-probs and entropies of tokens in tiles against whole logits: memory and time; GVM's norms.

    python -m rlzoo.bench logprobs [--timed-tokens 2048] [--frozen-head] [--repeats 5]

The head of Qwen2.5-0.5B: 151,936 places, 896 wide, float32, random weights. Plain is what one
writes down: whole logits, `logsumexp`, `gather`, the entropy from a softmax that carries no
gradient, and autograd's backward pass.

- `memory_ratio`: most bytes of tensors that stand at once in a forward and a backward pass, ours
  over plain, at `--tokens`. Counted on fake tensors, since plain logits of 8,192 tokens take 25 GB;
  the gradient of the head is counted, the head itself is not. What a kernel holds for itself is not
  counted: plain has more of that.
- `time_ratio`: seconds of the same, ours over plain, at `--timed-tokens`, side by side. With
  `--frozen-head`, as under LoRA, the hidden states alone have a gradient.
- `norm_time_ratio`: seconds of gradient norms, softmax and entropies included, over those of the
  scores alone, forward, of responses of `norm_length` tokens, 256. On paper it is 1 + T / (2 D) for
  responses of T tokens: 1.14 here, and over the bar of 1.3 from 540 tokens on (1.38 at 688, 1.57 at
  1,024, 2.7 at 3,072); a wider model pays less (1.43 at 3,072 where D is 3,584).
  `norm_time_ratio_at` has longer ones too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlzoo.bench._interleaved import figures, interleaved, ratio
from rlzoo.bench._live import peak_bytes
from rlzoo.models.gradnorms import head_gradient_norms
from rlzoo.models.logprobs import token_scores

LENGTHS = (256, 512, 1024)  # tokens of a response
MAIN_LENGTH = 256  # of `norm_time_ratio`

Scores = Callable[[Tensor, nn.Linear, Tensor], tuple[Tensor, Tensor]]


def plain_scores(hidden: Tensor, head: nn.Linear, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[M] log-probs and entropies from whole logits."""
    logits = head(hidden).float()
    log_norm = logits.logsumexp(-1)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - log_norm
    with torch.no_grad():
        entropy = log_norm - torch.linalg.vecdot(logits.softmax(-1), logits)
    return logprobs, entropy


def tiled_scores(hidden: Tensor, head: nn.Linear, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return token_scores(hidden, head, tokens, 1.0)


def update(scores: Scores, hidden: Tensor, head: nn.Linear, tokens: Tensor) -> None:
    """Forward and backward."""
    hidden.grad = head.weight.grad = None
    scores(hidden, head, tokens)[0].sum().backward()


class Size(NamedTuple):
    width: int
    vocabulary: int
    frozen: bool = False  # the head has no gradient


def case(tokens: int, size: Size) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    width, head = size.width, nn.Linear(size.width, size.vocabulary, bias=False)
    head.requires_grad_(not size.frozen)
    return torch.randn(tokens, width, requires_grad=True), head, torch.randint(9, (tokens,))


def memory(tokens: int, size: Size) -> dict[str, int]:
    """Most bytes of tensors at once, of both."""
    found = {}
    for name, scores in (("plain", plain_scores), ("tiled", tiled_scores)):
        with FakeTensorMode():
            found[name] = peak_bytes(partial(update, scores, *case(tokens, size)))
    return found


def seconds(tokens: int, size: Size, repeats: int) -> dict[str, list[float]]:
    """Of both updates; of scores alone, and of norms by a response's length."""
    hidden, head, ids = case(tokens, size)
    states = hidden.detach()
    runs: dict[str, Callable[[], object]] = {
        "plain": partial(update, plain_scores, hidden, head, ids),
        "tiled": partial(update, tiled_scores, hidden, head, ids),
        "scores": partial(torch.no_grad()(tiled_scores), states, head, ids),
    }
    for length in LENGTHS:
        parts = states.split(length), head.weight, ids.split(length)
        runs[f"norms of {length}"] = partial(head_gradient_norms, *parts, 1.0)
    return interleaved(runs, repeats)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench logprobs")
    parser.add_argument("--tokens", type=int, default=8192, help="that memory is counted of")
    parser.add_argument("--timed-tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--frozen-head", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    size = Size(args.width, args.vocabulary, args.frozen_head)
    held = memory(args.tokens, size)
    took = seconds(args.timed_tokens, size, args.repeats)
    print(f"memory of {args.tokens} tokens: {held['plain']:,} bytes plain, {held['tiled']:,} tiled")
    for name, times in took.items():
        print(f"{name:14} {' '.join(f'{time:7.2f}' for time in times)} s")
    norms = {n: ratio(took[f"norms of {n}"], took["scores"]) for n in LENGTHS}
    result = {
        **{"tokens": args.tokens, "timed_tokens": args.timed_tokens, "width": args.width},
        **{"vocabulary": args.vocabulary, "frozen_head": args.frozen_head},
        "threads": torch.get_num_threads(),
        "memory_ratio": round(held["tiled"] / held["plain"], 4),
        **figures("time_ratio", ratio(took["tiled"], took["plain"])),
        "norm_length": MAIN_LENGTH,
        **figures("norm_time_ratio", norms[MAIN_LENGTH]),
        "norm_time_ratio_at": {str(n): round(found.median, 3) for n, found in norms.items()},
    }
    print(json.dumps(result))
