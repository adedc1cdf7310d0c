from collections.abc import Callable
from pathlib import Path

import pytest

from tests.multinode.hosts import HERE, agents, finish

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
    """The run directory of two ranks of one torchrun on this machine, by strategy."""
    found: dict[str, Path] = {}

    def local(strategy: str) -> Path:
        if strategy not in found:
            cwd = tmp_path_factory.mktemp(strategy)
            overrides = (*SMALL, f"strategy={strategy}")
            finish(agents(HERE, *overrides, "run_dir=run", cwd=cwd, processes=2))
            found[strategy] = cwd / "run"
        return found[strategy]

    return local
