"""rlzoo's side of `rlzoo.bench.loop`: a run as users start it, held at a gate before each step."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import hydra
import torch
from hydra import compose

from rlzoo.bench._loop_gate import Gate, parity
from rlzoo.bench._slots import slots_counted
from rlzoo.launch.configuration import conf_dir
from rlzoo.launch.training import train
from rlzoo.loop import RolloutLoop
from rlzoo.ranks.whereabouts import HERE
from rlzoo.types import Prompt, Rollouts

# Seconds of the ledger's phases, by the names that both sides share.
PHASES = {
    "sampling": ("sampling/train", "gathering/train"),
    "reward": ("verifying/train",),
    "scoring": ("scoring",),
    "update": ("training",),
}


class Parity:
    def __call__(
        self, prompts: list[Prompt], texts: list[str], truncated: list[bool]
    ) -> list[float]:
        return parity(texts)


def questions_of(path: str) -> list[str]:
    return [
        "data=jsonl",
        f"data.path={path}",
        f"data.val_path={path}",  # never asked for
        "data.template.system=null",
        "data.template.user_suffix=''",
    ]


def overrides(spec: dict[str, Any], run_dir: str) -> list[str]:
    """The command line of the run: what is compared is rlzoo as it comes, but for what the other
    side does not do either (validation, checkpoints, files of rollouts)."""
    responses = spec["prompts_per_step"] * spec["group"]
    return [
        "model=hf",
        f"model.path={spec['policy']}",
        "lr=1.0e-9",  # the same work, and the policy stays what it is
        *spec.get("data", questions_of(spec["questions"])),
        "~reward",
        "+reward._target_=rlzoo.bench._loop_rlzoo.Parity",
        "sampler=uniform",
        *spec.get("engine", ["engine=transformers"]),
        f"algo.updates={spec['updates']}",
        f"datamodule.prompts_per_epoch={spec['prompts_per_step']}",
        f"datamodule.responses_per_prompt={spec['group']}",
        f"datamodule.responses_per_step={responses}",
        f"datamodule.max_prompt_tokens={spec['max_prompt_tokens']}",
        f"datamodule.max_response_tokens={spec['max_response_tokens']}",
        f"trainer.precision={'bf16-mixed' if spec['bf16'] else '32-true'}",
        "limits.max_responses=null",
        "callbacks.validation=null",
        "callbacks.checkpoint=null",
        "callbacks.export=null",
        "callbacks.preemption=null",
        "callbacks.rollout_log.rollouts_every=0",
        "logger=csv",
        f"run_dir={run_dir}",
        *spec["overrides"],
    ]


def totals(loop: RolloutLoop, slots: dict[str, int]) -> dict[str, float]:
    """Counts and seconds since the start."""
    ledger = loop.run.ledger
    spent = ledger.spent()
    seconds = {name: sum(spent.get(p, 0.0) for p in phases) for name, phases in PHASES.items()}
    found = {f"seconds/{name}": value for name, value in seconds.items()}
    counts = ledger.counts
    found |= {"tokens": counts["tokens/train"], "updates": counts["updates"]}
    return found | slots


def main(spec: dict[str, Any]) -> None:
    gate, draw = Gate(), RolloutLoop.draw
    names = {phase: name for name, phases in PHASES.items() for phase in phases}

    def phase() -> str:
        return names.get(HERE.phases[-1], "other") if HERE.phases else "other"

    with slots_counted(phase) as slots, tempfile.TemporaryDirectory() as folder:

        def paced(self: RolloutLoop) -> Rollouts:
            gate.wait(totals(self, dict(slots)), {"threads": torch.get_num_threads()})
            return draw(self)

        setattr(RolloutLoop, "draw", paced)  # noqa: B010 (mypy takes no method for a variable)
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            cfg = compose("train", overrides(spec, f"{folder}/run"))
        train(cfg)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
