from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
from lightning import Callback, LightningModule, Trainer

from rlzoo.ranks.exchange import world
from rlzoo.types import Prompt
from rlzoo.values import PathText


class Replan(Callback):
    """Asks the allocator for the budgets of each epoch, and writes them to `budgets/`.

    A resume inside an epoch finds its budgets in the DataModule and plans nothing; one at the end
    of an epoch plans in `on_train_start`, since Lightning then calls no `on_train_epoch_start`.

    Args:
        run_dir: where `budgets/epoch_NNNN.parquet` goes.
    """

    def __init__(self, run_dir: PathText) -> None:
        self.folder = Path(run_dir) / "budgets"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.replan(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.replan(trainer, pl_module)

    def replan(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Budgets for the epoch that begins, unless it has some."""
        data = trainer.datamodule
        if data.epoch_in_progress():
            return
        prompts = data.shard()
        seen = self.observe(trainer, pl_module, prompts)
        with data.ledger.phase("planning"):
            ids = [prompt.id for prompt in prompts]
            budgets = data.allocator.allocate(ids, data.total_budget)
            data.set_budgets(dict(zip(ids, budgets, strict=True)))
        if world()[0] == 0:
            self.write(data.epoch, ids, budgets, seen)

    def observe(
        self, trainer: Trainer, pl_module: LightningModule, prompts: list[Prompt]
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
