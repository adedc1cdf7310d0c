"""Every conf/algo file builds its class, and so does one from outside the repository."""

import sys
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from rlzoo.algos.optimization import OptimizationModule
from rlzoo.configuration import conf_dir
from tests.conftest import make_tiny_model
from tests.zoo import NAMES


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose("train", overrides=["run_dir=unused", *overrides])


@pytest.mark.parametrize("name", [*NAMES, "sft"])
def test_every_key_of_a_file_is_an_argument_of_its_class(name):
    config = compose(f"algo={name}", "limits.max_updates=10")
    algo = instantiate(config.algo)
    assert type(algo) is get_class(config.algo._target_) and isinstance(algo, OptimizationModule)
    algo.policy_factory = make_tiny_model
    algo.configure_model()
    (optimizer, schedule) = algo.configure_optimizers().values()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert schedule["interval"] == "step"


STRUCTURE = ("#", "-", "defaults:", "_target_:", "_partial_:", "optimizer:", "scheduler:")


@pytest.mark.parametrize("path", sorted((conf_dir() / "algo").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_key_of_a_file_has_a_comment(path):
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    assert lines[0].startswith("# ")
    assert [line for line in lines if "#" not in line and not line.startswith(STRUCTURE)] == []


def test_an_algorithm_from_outside_the_repository_runs_by_its_name(tmp_path: Path, monkeypatch):
    package = tmp_path / "outside"
    (package / "conf" / "algo").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "signs.py").write_text(
        "from rlzoo.algos.clipped import ClippedPolicyAlgorithm\n"
        "class Signs(ClippedPolicyAlgorithm):\n"
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
