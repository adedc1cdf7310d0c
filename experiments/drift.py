"""How far a run's policy has moved: entropy, and KL to the policy it started from.

The KL is estimated by the mean log-ratio of the policy's own sampled tokens (k1), nats a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlzoo.data.rollout_files import read_rollouts
from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.models.logprobs import response_scores
from rlzoo.models.policy import eos_token_ids, load_policy, load_tokenizer
from rlzoo.rng import response_seed
from rlzoo.types import BatchRow, collate

NUM_PROMPTS = 256


@torch.no_grad()
def entropy_and_kl_to_start(run_dir: Path) -> dict[str, float]:
    """Token means, nats, over a response of the final policy to each of 256 validation prompts."""
    transformers.utils.logging.disable_progress_bar()
    config = OmegaConf.load(run_dir / "config.yaml")
    tokenizer = load_tokenizer(config.model.path)
    start = load_policy(config.model.path, init_from=config.init_from).eval()
    final = load_policy(str(run_dir / "policy")).eval()
    source, size = instantiate(config.data), config.datamodule
    prompts = source.template.encode(source.load("val"), tokenizer, size.max_prompt_tokens)
    prompts = prompts[:NUM_PROMPTS]
    engine = TransformersEngine(
        lambda: load_policy(str(run_dir / "policy")),
        eos_token_ids(config.model.path, tokenizer),
        tokenizer.pad_token_id,
    )
    engine.load_weights(final.named_parameters(), 0)
    requests = [Request(p.token_ids, (response_seed(0, "val", 0, 0, p.id, 0),)) for p in prompts]
    params = SamplingParams(size.temperature, size.max_response_tokens)
    drawn = [response for (response,) in engine.generate(requests, params, 0)]
    pairs = zip(prompts, drawn, strict=True)
    rows = [BatchRow(prompt.token_ids, response.token_ids) for prompt, response in pairs]
    batch = collate(rows, tokenizer.pad_token_id)
    now, then = (response_scores(p, batch, size.temperature) for p in (final, start))
    mask = batch.response_mask
    kl = (now.logprobs - then.logprobs)[mask].mean()
    return {"entropy": float(now.entropy[mask].mean()), "kl_to_start": float(kl)}


@torch.no_grad()
def drift_along(run_dir: Path, steps: Sequence[int]) -> dict[str, dict[str, float]]:
    """Entropy and KL to the start after some rollout steps, from the training rollouts drawn next:
    all of them, whichever an algorithm trains on. The entropy is the mean of -log pi."""
    config = OmegaConf.load(run_dir / "config.yaml")
    start = load_policy(config.model.path, init_from=config.init_from).eval()
    pad, temperature = load_tokenizer(config.model.path).pad_token_id, config.datamodule.temperature
    found = {}
    for step in steps:
        rollouts = read_rollouts(run_dir / "rollouts" / f"step_{step:06d}.parquet", step)
        batch = collate(rollouts.rows(), pad)
        then = response_scores(start, batch, temperature).logprobs[batch.response_mask]
        now = batch.sampler_logprobs[batch.response_mask]
        found[str(step)] = {"entropy": float(-now.mean()), "kl": float((now - then).mean())}
    return found
