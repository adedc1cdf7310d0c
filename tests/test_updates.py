"""Updates that must not be made leave no trace: weights, Adam's state and the schedule stand."""

import math

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from rlzoo.algos import PolicyAlgorithm
from rlzoo.errors import UserError
from rlzoo.report.ledger import Ledger

GOOD, EMPTY, NAN, INF = "good", "empty", "nan", "inf"


class Line(PolicyAlgorithm):
    """Moves one weight by its gradient of 1, or does what the batch says."""

    def __init__(self, max_skipped_updates: int = 10) -> None:
        super().__init__(
            policy=lambda: nn.Linear(1, 1, bias=False),
            optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
            scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.5**n),
            max_skipped_updates=max_skipped_updates,
        )
        self.seen: list[tuple[float, float, float]] = []  # weight, Adam's steps, lr after each

    def training_step(self, batch: list[str], batch_idx: int) -> torch.Tensor:
        kind = batch[0]
        self.divisor = 0.0 if kind == EMPTY else 1.0
        factor = {GOOD: 1.0, EMPTY: 0.0, NAN: math.nan, INF: math.inf}[kind]
        return self.policy.weight.sum() * factor

    def on_train_batch_end(self, outputs: object, batch: list[str], batch_idx: int) -> None:
        optimizer = self.trainer.optimizers[0]
        state = optimizer.state.get(self.policy.weight, {})
        lr = optimizer.param_groups[0]["lr"]
        self.seen.append((float(self.policy.weight.detach()), float(state.get("step", 0)), lr))


def fit(module: Line, *kinds: str) -> Ledger:
    data = LightningDataModule()
    data.train_dataloader = lambda: DataLoader(list(kinds), batch_size=1)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    return module.ledger


@pytest.mark.parametrize(
    "kind, reason", [(EMPTY, "empty"), (NAN, "non_finite"), (INF, "non_finite")]
)
def test_a_skipped_update_leaves_weights_adam_and_schedule_as_they_were(kind, reason):
    module = Line()
    ledger = fit(module, GOOD, kind, kind, GOOD)
    first, second, third, last = module.seen
    assert first == second == third
    assert last[0] != third[0] and last[1] == 2 and last[2] == 0.1 * 0.5**2
    assert ledger.updates == 2 and ledger.counts[f"skipped/{reason}"] == 2


def test_too_many_non_finite_updates_in_a_row_stop_the_run():
    with pytest.raises(UserError, match="3 updates in a row.*max_skipped_updates=2"):
        fit(Line(max_skipped_updates=2), GOOD, NAN, NAN, NAN)


def test_a_good_update_between_non_finite_ones_starts_the_count_again():
    assert fit(Line(max_skipped_updates=2), NAN, NAN, GOOD, NAN, NAN, GOOD).updates == 2


def test_empty_updates_never_stop_the_run():
    assert fit(Line(max_skipped_updates=1), *[EMPTY] * 5, GOOD).updates == 1


def test_gradients_are_clipped_by_their_global_norm():
    module = Line()
    module.configure_model()
    module.policy.weight.grad = torch.full((1, 1), 8.0)
    optimizer = torch.optim.SGD(module.parameter_groups(), lr=1.0)
    module.configure_gradient_clipping(optimizer, gradient_clip_val=2.0)
    assert module.policy.weight.grad.item() == pytest.approx(2.0)
    assert module.grad_norms == [{"policy": 8.0}]
