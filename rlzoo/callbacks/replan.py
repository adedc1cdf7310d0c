from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
from lightning import Callback

from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.callbacks.state import Run
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.ranks.exchange import world
from rlzoo.types import Prompt
from rlzoo.values import PathText


class Replan(Callback):
    """Asks the allocator for the budgets of each epoch, and writes them to `budgets/`.

    A resume inside an epoch finds its budgets in the DataModule and plans nothing.

    Args:
        run_dir: where `budgets/epoch_NNNN.parquet` goes.

    Attributes:
        uses_engine: whether it draws, and may leave the engine asleep.
    """

    uses_engine = False

    def __init__(self, run_dir: PathText) -> None:
        self.folder = Path(run_dir) / "budgets"

    def plan(self, run: Run, data: RolloutDataModule, algo: PolicyAlgorithm) -> None:
        """Budgets for the epoch that begins."""
        prompts = data.shard()
        seen = self.observe(run, data, algo, prompts)
        with run.ledger.phase("planning"):
            ids = [prompt.id for prompt in prompts]
            budgets = data.allocator.allocate(ids, data.total_budget)
            data.set_budgets(dict(zip(ids, budgets, strict=True)))
        if world()[0] == 0:
            self.write(data.epoch, ids, budgets, seen)

    def observe(
        self, run: Run, data: RolloutDataModule, algo: PolicyAlgorithm, prompts: list[Prompt]
    ) -> dict[str, list[float]]:
        """What is learnt of the prompts before they get budgets: columns of [P] values."""
        return {}

    def write(
        self, epoch: int, ids: list[str], budgets: list[int], seen: dict[str, list[float]]
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = {"prompt_id": ids, "budget": budgets, "epoch": [epoch] * len(ids)} | seen
        path = self.folder / f"epoch_{epoch:04d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
