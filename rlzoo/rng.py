"""Counter-based randomness: every draw is a function of what it is for, not of what came before.

A response's noise depends on (run seed, stream, rollout step, round, prompt id, response index)
alone, so no two draws share noise by accident and a run can be replayed on any number of ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np

STREAMS = ("pilot", "train", "val")


def derive_seed(*parts: int | str) -> int:
    """A non-negative 63-bit seed from any parts; equal parts give equal seeds, anywhere."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def response_seed(
    run_seed: int, stream: str, rollout_step: int, round_: int, prompt_id: str, index: int
) -> int:
    """The seed of one response.

    Args:
        run_seed: `seed` of the run.
        stream: one of STREAMS, so that pilots, training and validation never share noise.
        rollout_step: counted from the start of the run; for pilots, the step they precede.
        round_: which draw within the rollout step (0 but for samplers that draw in rounds).
        prompt_id, index: which prompt, and which of its responses.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {STREAMS}, got {stream!r}")
    return derive_seed(run_seed, stream, rollout_step, round_, prompt_id, index)


def uniforms(seed: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the noise of one response's tokens, in order."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)
