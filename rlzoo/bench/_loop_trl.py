"""TRL's side of `rlzoo.bench.loop`, run in an environment of its own (`make trl`)."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

import datasets
import torch
from trl import GRPOConfig, GRPOTrainer

from rlzoo.bench._loop_gate import Gate, parity
from rlzoo.bench._slots import slots_counted


def reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    return parity([turns[0]["content"] for turns in completions])


PAGE = 32  # tokens of a block of its cache


class Paced(GRPOTrainer):  # type: ignore[misc]  # TRL is not here when types are checked
    """TRL's trainer, held at a gate before it generates, with a clock on what it does."""

    gate: Gate
    slots: Counter[str]
    facts: dict[str, Any]
    phase = "update"

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not hasattr(self, "clock"):
            self.clock: Counter[str] = Counter()
        self.gate.wait(self.totals(), self.facts)
        self.phase = "scoring"  # all of this method but what the two below do
        try:
            return self.timed("scoring", super()._generate_and_score_completions, inputs)
        finally:
            self.phase = "update"

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.phase = "sampling"
        found = self.timed("sampling", super()._generate_single_turn, *args, **kwargs)
        self.phase = "scoring"
        self.clock["tokens"] += sum(map(len, found[0]))
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        return self.timed("reward", super()._calculate_rewards, *args, **kwargs)

    def timed(self, name: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.clock[f"seconds/{name}"] += time.perf_counter() - began  # type: ignore[assignment]

    def totals(self) -> dict[str, float]:
        found: dict[str, float] = dict(self.clock)
        inner = found.get("seconds/sampling", 0.0) + found.get("seconds/reward", 0.0)
        found["seconds/scoring"] = found.get("seconds/scoring", 0.0) - inner
        return found | {"updates": self.state.global_step} | dict(self.slots)


def settings(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """TRL's own defaults, but for what makes both sides do the same, and what makes it faster
    here: no gradient checkpointing, an update in one microbatch, and a batch of continuous
    batching that takes all responses, from a cache that holds them all."""
    responses = spec["prompts_per_step"] * spec["group"]
    update = responses // spec["updates"]
    longest = spec["max_prompt_tokens"] + spec["max_response_tokens"]
    microbatch = min(spec["microbatch"] or update, update)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": update // microbatch,
        "steps_per_generation": responses // microbatch,
        "num_generations": spec["group"],
        "max_completion_length": spec["max_response_tokens"],
        "max_steps": 10**6,
        "learning_rate": 1e-9,
        "lr_scheduler_type": "constant",
        "bf16": spec["bf16"],
        "gradient_checkpointing": False,
        "use_transformers_continuous_batching": spec["continuous"],
        "transformers_continuous_batching_config": {
            "page_size": PAGE,
            "num_blocks": 2 * responses * (longest // PAGE + 1),
            "max_batch_tokens": max(256, 2 * responses),
            "use_async_batching": False,
            "allow_block_sharing": False,
        }
        if spec["continuous"]
        else None,
        "model_init_kwargs": {"dtype": "float32"},
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": spec["updates"],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **spec["trl"],
    }


def main(spec: dict[str, Any]) -> None:
    gate = Gate()
    with open(spec["questions"]) as file:
        rows = [json.loads(line) for line in file]
    data = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows]
    )
    with slots_counted(lambda: trainer.phase) as slots, tempfile.TemporaryDirectory() as folder:
        given = settings(spec, folder)
        trainer = Paced(
            model=spec["policy"],
            reward_funcs=reward,
            args=GRPOConfig(**given),
            train_dataset=data,
        )
        shown = {name: value for name, value in given.items() if name != "output_dir"}
        trainer.gate, trainer.slots = gate, slots
        trainer.facts = {
            "trl": version("trl"),
            "settings": shown,
            "threads": torch.get_num_threads(),
        }
        trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
