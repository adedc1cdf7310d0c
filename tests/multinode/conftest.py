from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_runs import run

SMALL = (
    "num_threads=1",
    "val_every=2",
    "data.num_train=64",
    "data.num_val=4",
    "datamodule.prompts_per_epoch=16",
    "datamodule.responses_per_prompt=4",
    "datamodule.responses_per_step=32",
    "sampler.callback.pilots=2",
    "limits.max_responses=96",  # one epoch: 32 pilots, two rollout steps of 32
    "algo.updates=2",
    "~logger.tensorboard",
    "callbacks.export=null",
)


@pytest.fixture(scope="session")
def two_local_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of two ranks on this machine, by strategy."""
    found: dict[str, Path] = {}

    def local(strategy: str) -> Path:
        if strategy not in found:
            run_dir = tmp_path_factory.mktemp(strategy) / "run"
            overrides = (*SMALL, f"strategy={strategy}", "trainer.devices=2")
            run(run_dir, *overrides)
            found[strategy] = run_dir
        return found[strategy]

    return local
