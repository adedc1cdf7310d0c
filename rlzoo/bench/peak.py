"""Bytes of tensors in an update on this CPU, against the forecast of `rlzoo.models.memory`.

    python -m rlzoo.bench peak [--shape 25m] [--tokens 1024]

A GRPO update (PPO's with `ppo`) of three microbatches under Lightning's Trainer, the second of two,
so that Adam's states are there. Every storage that lives is counted, each once; what a kernel takes
within one operation is not seen. The weights are random: memory does not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
import transformers

from rlzoo.algos import GRPO, PPO, PolicyAlgorithm
from rlzoo.bench._live import Live
from rlzoo.bench._random_policies import SHAPES, save_policy
from rlzoo.loop import updates_of
from rlzoo.models import memory
from rlzoo.models.memory import Setting, shape_of
from rlzoo.models.policy import load_policy
from rlzoo.types import Prompt, Rollouts, Update

GROUP, PROMPT = 4, 16  # responses of a prompt; tokens of it
PARTS = 3  # microbatches of an update
ARITHMETIC: dict[str, memory.Arithmetic] = {
    "32-true": "float32",
    "bf16-mixed": "autocast",
    "bf16-true": "half",
}


class Case(NamedTuple):
    """One way to train."""

    precision: str = "32-true"
    recompute: bool = False
    attention: str = "packed"
    ppo: bool = False
    kl: bool = False
    lora: bool = False
    longest: int = 512  # tokens of a sequence

    @property
    def setting(self) -> Setting:
        return Setting(
            arithmetic=ARITHMETIC[self.precision],
            element=2 if self.precision == "bf16-true" else 4,
            recompute=self.recompute,
            critic=self.ppo,
            reference=self.kl,
            device="cpu",
        )


CASES = {
    "float32": Case(),
    "float32_padded": Case(attention="sdpa"),
    "float32_recomputed": Case(recompute=True),
    "float32_short": Case(longest=128),
    "autocast": Case(precision="bf16-mixed"),
    "autocast_recomputed": Case(precision="bf16-mixed", recompute=True),
    "half": Case(precision="bf16-true"),
    "reference": Case(kl=True),
    "autocast_reference": Case(precision="bf16-mixed", kl=True),
    "ppo": Case(ppo=True),
    "lora": Case(lora=True),
}


def rollouts_of(tokens: int, longest: int, vocabulary: int) -> Rollouts:
    """Rollouts of `tokens` tokens in all, every sequence as long as the others."""
    draw = torch.Generator().manual_seed(0)
    count = tokens // longest // GROUP * GROUP
    prompts = [
        Prompt(f"p{i}", "q", "a", token_ids=tuple(range(2, 2 + PROMPT)))
        for i in range(count // GROUP)
    ]
    length = longest - PROMPT
    return Rollouts(
        prompts=prompts,
        group_ids=torch.arange(len(prompts)).repeat_interleave(GROUP),
        responses=[torch.randint(2, vocabulary, (length,), generator=draw) for _ in range(count)],
        sampler_logprobs=[torch.full((length,), -10.0) for _ in range(count)],
        truncated=torch.zeros(count, dtype=torch.bool),
        rewards=(torch.arange(count) % 2).float(),
        verdicts=torch.zeros(count, dtype=torch.int8),
        policy_version=0,
        rollout_step=1,
    )


class TwoUpdates(lightning.LightningDataModule):
    """The same update twice; says when the second begins."""

    def __init__(self, rollouts: Rollouts, begins: Callable[[], None]) -> None:
        super().__init__()
        self.rollouts, self.begins = rollouts, begins

    def train_dataloader(self) -> TwoUpdates:
        return self

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Update]:
        assert self.trainer is not None
        algo = self.trainer.lightning_module
        assert isinstance(algo, PolicyAlgorithm)
        (update,) = updates_of(self.rollouts, algo)
        yield update
        self.begins()
        yield update


def measured(case: Case, folder: str, tokens: int) -> tuple[int, dict[str, float]]:
    """Peak bytes of the second update; the forecast of it by part."""
    live = Live(found_too=True)
    lora = {"r": 16, "alpha": 32} if case.lora else None
    policy = functools.partial(
        load_policy,
        folder,
        attention=case.attention,
        gradient_checkpointing=case.recompute,
        lora=lora,
    )
    kind: Any = PPO if case.ppo else GRPO
    algo = kind(
        policy,
        functools.partial(torch.optim.AdamW, lr=1e-5, fused=True),
        kl_coef=1e-3 if case.kl else 0.0,
        max_response_tokens=case.longest,
        max_logprob_gap=1e9,
        tokens_per_microbatch=tokens,
    )
    model = policy()
    shape = shape_of(model.config, model)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad) if lora else None
    if lora:
        shape = shape._replace(parameters=shape.parameters - (adapters or 0))
    vocabulary = shape.vocabulary
    del model

    def begins() -> None:
        live.peak = live.now

    data = TwoUpdates(rollouts_of(PARTS * tokens, case.longest, vocabulary), begins)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=case.precision,  # type: ignore[arg-type]  # one of Lightning's names
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with live:
        trainer.fit(algo, datamodule=data)
    setting = case.setting._replace(adapters=adapters)
    return live.peak, memory.training(shape, setting, tokens)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench peak")
    parser.add_argument("--shape", default="25m", choices=SHAPES, help="of the policy")
    parser.add_argument("--tokens", type=int, default=1024, help="of a microbatch")
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES])
    arguments = parser.parse_args(argv)
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.utils.logging.disable_progress_bar()
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        count = save_policy(Path(folder), arguments.shape)
        print(f"{count:,} parameters, microbatches of {arguments.tokens:,} tokens; MB")
        print(f"{'':20}{'measured':>10}{'on paper':>10}{'ratio':>8}")
        for name in arguments.cases:
            peak, parts = measured(CASES[name], folder, arguments.tokens)
            ratios[name] = peak / sum(parts.values())
            told = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in parts.items() if size)
            figures = f"{peak / 1e6:10.1f}{sum(parts.values()) / 1e6:10.1f}{ratios[name]:8.3f}"
            print(f"{name:20}{figures}  {told}", flush=True)
    worst = max(ratios.values(), key=lambda ratio: abs(ratio - 1))
    print(json.dumps({"peak_over_forecast": ratios, "worst": worst}))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
