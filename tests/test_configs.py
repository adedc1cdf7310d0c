"""Every file of conf/ composes and builds what it names; so does an algorithm from outside."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import hydra
import lightning
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

import rlzoo.report.trackers
from rlzoo.launch.configuration import conf_dir
from rlzoo.launch.training import build, build_trainer
from rlzoo.report.progress import Bars
from tests.conftest import make_tiny_model

GROUPS = sorted(p for p in conf_dir().iterdir() if p.is_dir())
BASES = ("algo/shared", "algo/clipped")  # keys that algorithms share, no choice of their own
FILES = [f"{group.name}/{p.stem}" for group in GROUPS for p in sorted(group.glob("*.yaml"))]
CHOICES = [name for name in FILES if name not in BASES]
ON_CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
NEEDS = {  # what a user has to give besides the choice, and what this machine has not
    "engine/vllm_server": ["engine.addresses=[http://localhost:8000]"],
    "model/hf": ["model.path=tiny", "lr=1e-4"],
    "datamodule/sft": ["algo=sft"],
    "callbacks/sft": ["algo=sft"],
    "trainer/gpu": ON_CPU,
    "trainer/gpu8": ON_CPU,
    "trainer/slurm": ON_CPU,
}


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose("train", overrides=["run_dir=unused", *overrides])


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds_a_whole_run(choice, tmp_path, monkeypatch):
    group, name = choice.split("/")
    if name in ("wandb", "mlflow"):  # imported when their runs begin
        monkeypatch.setattr(rlzoo.report.trackers, "find_spec", lambda name: name)
    overrides = [f"{group}={name}", f"run_dir={tmp_path}", *NEEDS.get(choice, [])]
    if group == "data" and name != "arithmetic":
        rows = [{"question": f"1 + {i}?", "answer": f"#### {1 + i}"} for i in range(64)]
        suffix = "parquet" if name == "parquet" else "jsonl"
        path = tmp_path / f"prompts.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides.append(f"data.path={path}")
    config = compose(*overrides, "limits.max_updates=10")
    loop, others = build(config, Bars(enabled=False))
    try:
        trainer = build_trainer(config, [*loop.parts.present, *others, loop], None)
        assert isinstance(trainer, lightning.Trainer)
        algo = loop.algo
        assert type(algo) is get_class(config.algo._target_)
        algo.policy_factory = make_tiny_model
        algo.configure_model()
        (optimizer, schedule) = algo.configure_optimizers().values()
        assert isinstance(optimizer, torch.optim.AdamW)
        assert schedule["interval"] == "step"
    finally:
        loop.run.close()


@pytest.mark.parametrize("path", [conf_dir() / f"{name}.yaml" for name in FILES], ids=FILES)
def test_every_file_says_what_it_is_and_every_value_of_its_own_what_it_means(path):
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    assert lines[0].startswith("# ")
    if path.parent.name == "experiment":  # values of other files' keys
        return
    structure = ("-", "defaults:", "_target_:", "_partial_:", "{}")
    for above, line in pairwise(lines):
        if not line.startswith(structure) and not line.endswith(":") and "${" not in line:
            assert "#" in line or above.startswith("#"), line


def test_an_algorithm_from_outside_the_repository_runs_by_its_name(tmp_path: Path, monkeypatch):
    package = tmp_path / "outside"
    (package / "conf" / "algo").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "signs.py").write_text(
        "from rlzoo.algos import PolicyAlgorithm\n"
        "class Signs(PolicyAlgorithm):\n"
        "    def __init__(self, *args, gain=1.0, **shared):\n"
        "        super().__init__(*args, **shared)\n"
        "        self.gain = gain\n"
        "    def compute_advantages(self, rollouts):\n"
        "        return self.gain * (2 * rollouts.rewards - 1)\n"
    )
    (package / "conf" / "algo" / "signs.yaml").write_text(
        "defaults: [clipped, _self_]\n_target_: outside.signs.Signs\ngain: 2.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = compose("algo=signs", f"hydra.searchpath=[file://{package / 'conf'}]")
    algo = instantiate(config.algo)
    assert type(algo).__name__ == "Signs" and algo.gain == 2.0 and algo.clip_low == 0.2
    assert "outside.signs" in sys.modules
