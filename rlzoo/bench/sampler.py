"""Engines side by side: log-prob gap, weight sync, ragged budgets, memory (`engine=vllm` needed).

Every case runs in a process of its own, since a process holds one vLLM engine; `--case NAME` runs
one alone. Policies: the tiny one that ships with rlzoo, and a random Qwen2 of 50M parameters. A
rollout step here is 256 prompts with budgets of 1 to 16 responses. The last line is JSON with
    logprob_gap_max_tied, logprob_gap_max_untied: largest |vLLM - trainer| log-prob after each of 20
        random weight syncs, nats, float32;
    sync_share: seconds of a weight sync of the 50M policy over those of a rollout step's sampling;
    ragged_over_padded_seconds, ragged_over_padded_tokens: sampling by budget over sampling 16
        responses of every prompt, with vLLM and the tiny policy;
    memory_growth: of the process, from the fifth to the fiftieth cycle of sync and draw, share;
and, for each engine and policy, responses per second and start-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rlzoo.engines.base import Engine, Request, Response, SamplingParams
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.engines.vllm import VLLMEngine
from rlzoo.models.loading import TINY
from rlzoo.models.logprobs import response_scores
from rlzoo.models.policy import eos_token_ids, load_policy, load_tokenizer
from rlzoo.types import BatchRow, collate

PROMPTS, LARGEST = 256, 16
SYNCS, CYCLES = 20, 50
TOKENS = {"tiny": 96, "50m": 8}  # longest response; random weights hardly ever end one
REPEATS = {"tiny": 3, "50m": 1}  # of ragged and padded, in turn; medians are taken
EOS, PAD = [2], 0  # of random policies


def build(name: str, folder: str) -> tuple[PreTrainedModel, str]:
    """A policy, and a directory with its configuration."""
    if name == "tiny":
        return load_policy("tiny"), str(TINY)
    sizes = {"50m": (512, 12, 1408, 8, 16384)}.get(name, (128, 2, 256, 4, 512))
    hidden, layers, intermediate, heads, vocabulary = sizes
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=name == "tied",
        bos_token_id=None,
        eos_token_id=EOS[0],
        pad_token_id=PAD,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return model, folder


def start(engine: str, policy: PreTrainedModel, path: str, folder: str) -> tuple[Engine, float]:
    """An engine that holds the policy's weights, and the seconds that it took to start."""
    eos = eos_token_ids("tiny", load_tokenizer("tiny")) if path == str(TINY) else EOS
    began = time.perf_counter()
    if engine == "vllm":
        made: Engine = VLLMEngine(
            path,
            eos,
            max_prompt_tokens=64,
            max_response_tokens=128,
            log_file=str(Path(folder) / "vllm.log"),
        )
    else:
        made = TransformersEngine(lambda: load_like(policy), eos, PAD, max_rows=1024)
    made.wake()
    made.load_weights(policy.named_parameters(), 0)
    return made, time.perf_counter() - began


def load_like(policy: PreTrainedModel) -> PreTrainedModel:
    return type(policy)(policy.config)


def requests(budgets: np.ndarray, vocabulary: int, stream: int = 0) -> list[Request]:
    """Prompts of 8 to 40 tokens, always the same, with `budgets[i]` seeds each."""
    draw = np.random.Generator(np.random.Philox(key=1))
    found = []
    for index, budget in enumerate(budgets):
        tokens = draw.integers(3, vocabulary, draw.integers(8, 41))
        first = (stream << 40) + (index << 16)
        found.append(Request(tuple(tokens.tolist()), tuple(range(first, first + budget))))
    return found


def ragged() -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=2)).integers(1, LARGEST + 1, PROMPTS)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def tokens_of(drawn: list[list[Response]]) -> int:
    return sum(len(response.token_ids) for group in drawn for response in group)


# --- cases --------------------------------------------------------------------------------------


def gap(policy: PreTrainedModel, engine: Engine) -> dict[str, float]:
    """Largest gap of any sampled token, over random weights."""
    wanted = requests(np.full(32, 2), policy.config.vocab_size)
    largest, total, count = 0.0, 0.0, 0
    for version in range(1, SYNCS + 1):
        torch.manual_seed(version)
        for parameter in policy.parameters():
            parameter.data += 0.05 * parameter.data.std() * torch.randn_like(parameter)
        engine.load_weights(policy.named_parameters(), version)
        drawn = engine.generate(wanted, SamplingParams(1.0, 32), version)
        rows = [(q, r) for q, group in zip(wanted, drawn, strict=True) for r in group]
        gaps = torch.cat([gap_of(policy, q.token_ids, r) for q, r in rows])
        largest = max(largest, float(gaps.max()))
        total, count = total + float(gaps.sum()), count + gaps.numel()
    return {"max": largest, "mean": total / count, "tokens": count}


@torch.no_grad()
def gap_of(policy: PreTrainedModel, prompt: tuple[int, ...], response: Response) -> torch.Tensor:
    batch = collate([BatchRow(prompt, response.token_ids)], PAD)
    return (response_scores(policy, batch, 1.0).logprobs[0] - response.logprobs).abs()


def speed(policy: PreTrainedModel, engine: Engine, size: str) -> dict[str, float]:
    """Ragged against padded, interleaved; weight sync against sampling and a plain copy."""
    vocabulary, params = policy.config.vocab_size, SamplingParams(1.0, TOKENS[size])
    budgets = {"ragged": ragged(), "padded": np.full(PROMPTS, LARGEST)}
    engine.generate(requests(np.full(8, 2), vocabulary, 9), params, 0)  # compiles what it compiles
    seconds: dict[str, list[float]] = {name: [] for name in (*budgets, "sync", "copy")}
    tokens, responses = {}, {}
    target = [parameter.detach().clone() for parameter in policy.parameters()]

    def draw(sizes: np.ndarray, stream: int) -> list[list[Response]]:
        return engine.generate(requests(sizes, vocabulary, stream), params, 0)

    def copy() -> None:
        for to, parameter in zip(target, policy.parameters(), strict=True):
            to.copy_(parameter.data)

    for repeat in range(REPEATS[size]):
        for name, sizes in budgets.items():
            took, drawn = timed(partial(draw, sizes, repeat))
            seconds[name].append(took)
            tokens[name], responses[name] = tokens_of(drawn), sum(map(len, drawn))
            took, _ = timed(lambda: engine.load_weights(policy.named_parameters(), 0))
            seconds["sync"].append(took)
            took, _ = timed(copy)
            seconds["copy"].append(took)
    mid = {name: median(values) for name, values in seconds.items()}
    gigabytes = sum(p.numel() * p.element_size() for p in policy.parameters()) / 1e9
    return {
        "responses_per_second": responses["ragged"] / mid["ragged"],
        "tokens_per_second": tokens["ragged"] / mid["ragged"],
        "budget_exact": responses["ragged"] == int(budgets["ragged"].sum()),
        "ragged_over_padded_seconds": mid["ragged"] / mid["padded"],
        "ragged_over_padded_tokens": tokens["ragged"] / tokens["padded"],
        "spread": max(seconds["ragged"]) / min(seconds["ragged"]),
        "sync_seconds": mid["sync"],
        "sync_share": mid["sync"] / mid["ragged"],
        "sync_gb_per_second": gigabytes / mid["sync"],
        "copy_over_sync": mid["copy"] / mid["sync"],
    }


def alone(policy: PreTrainedModel, engine: Engine) -> dict[str, float]:
    """The same request by itself and among 512 responses: tokens that differ."""
    wanted, params = requests(np.full(64, 8), policy.config.vocab_size), SamplingParams(1.0, 64)
    together = engine.generate(wanted, params, 0)
    differing = excused = 0
    for request, group in list(zip(wanted, together, strict=True))[:16]:
        for seed, response in zip(request.seeds, group, strict=True):
            ((single,),) = engine.generate([Request(request.token_ids, (seed,))], params, 0)
            same = single.token_ids.tolist() == response.token_ids.tolist()
            differing += not same
            excused += not same and single.near_ties + response.near_ties > 0
    return {"responses": 128, "differing": differing, "differing_near_ties": excused}


def memory(policy: PreTrainedModel, engine: Engine) -> dict[str, float]:
    """Resident memory over cycles of sync and draw."""
    process, found = psutil.Process(), []
    wanted = requests(np.full(64, 4), policy.config.vocab_size)
    for version in range(1, CYCLES + 1):
        engine.load_weights(policy.named_parameters(), version)
        engine.generate(wanted, SamplingParams(1.0, 32), version)
        found.append(process.memory_info().rss / 2**20)
    return {"fifth_mib": found[4], "last_mib": found[-1], "growth": found[-1] / found[4] - 1}


CASES: dict[str, tuple[str, str, Callable[..., dict[str, float]]]] = {
    "gap_tied": ("vllm", "tied", gap),
    "gap_untied": ("vllm", "untied", gap),
    "tiny_vllm": ("vllm", "tiny", lambda p, e: speed(p, e, "tiny")),
    "tiny_transformers": ("transformers", "tiny", lambda p, e: speed(p, e, "tiny")),
    "50m_vllm": ("vllm", "50m", lambda p, e: speed(p, e, "50m")),
    "50m_transformers": ("transformers", "50m", lambda p, e: speed(p, e, "50m")),
    "alone_vllm": ("vllm", "tiny", alone),
    "alone_transformers": ("transformers", "tiny", alone),
    "memory_vllm": ("vllm", "tiny", memory),
    "memory_transformers": ("transformers", "tiny", memory),
}


def run_case(name: str) -> dict[str, float]:
    engine_name, policy_name, case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        policy, path = build(policy_name, folder)
        engine, started = start(engine_name, policy, path, folder)
        try:
            return case(policy, engine) | {"start_seconds": started}
        finally:
            engine.close()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench sampler", description=__doc__)
    parser.add_argument("--case", choices=CASES, help="one case alone, in this process")
    asked = parser.parse_args(argv).case
    if asked:
        print(json.dumps(run_case(asked)))
        return
    found: dict[str, dict[str, float]] = {}
    for name in CASES:
        command = [sys.executable, "-m", "rlzoo.bench", "sampler", "--case", name]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
        figures = ", ".join(f"{key} {value:.4g}" for key, value in found[name].items())
        print(f"{name:20} {figures}", flush=True)
    print(json.dumps(headline(found)))


def headline(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figures that have a bar, and the rates of every engine and policy."""
    rates = {
        f"{key}/{name}": figures[key]
        for name, figures in found.items()
        for key in ("responses_per_second", "start_seconds")
        if key in figures
    }
    return {
        "logprob_gap_max_tied": found["gap_tied"]["max"],
        "logprob_gap_max_untied": found["gap_untied"]["max"],
        "sync_share": found["50m_vllm"]["sync_share"],
        "ragged_over_padded_seconds": found["tiny_vllm"]["ragged_over_padded_seconds"],
        "ragged_over_padded_tokens": found["tiny_vllm"]["ragged_over_padded_tokens"],
        "memory_growth": found["memory_vllm"]["growth"],
    } | rates
