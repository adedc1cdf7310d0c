"""Made-up rollouts of any shape, for tests that need no engine."""

import torch

from rlzoo.types import Prompt, Rollouts


def recorded_rollouts(
    sizes: tuple[int, ...] = (3, 1, 4), seed: int = 0, vocabulary: int = 40, longest: int = 9
) -> Rollouts:
    """Groups of the given sizes, with 0/1 rewards and lengths from 1 to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, n: torch.randint(2, high, (n,), generator=generator)  # noqa: E731
    total = sum(sizes)
    prompts = [
        Prompt(f"p{i}", "q", "a", token_ids=tuple(draw(vocabulary, 2 + i % 4).tolist()))
        for i in range(len(sizes))
    ]
    lengths = torch.randint(1, longest + 1, (total,), generator=generator).tolist()
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        responses=[draw(vocabulary, n) for n in lengths],
        sampler_logprobs=[torch.full((n,), -1.0) for n in lengths],
        truncated=torch.zeros(total, dtype=torch.bool),
        rewards=torch.randint(0, 2, (total,), generator=generator).float(),
        verdicts=torch.zeros(total, dtype=torch.int8),
        policy_version=0,
        rollout_step=3,
    )
