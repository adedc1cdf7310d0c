"""Optimizer steps on recorded rollouts under any strategy, on any number of ranks.

`python -m tests.strategies.steps FOLDER`, as a rank that torchrun starts, runs every case of CASES
and leaves what rank 0 got in FOLDER.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import lightning
import torch
import torch.distributed as dist
from torch import Tensor

from rlzoo.algos import PolicyAlgorithm
from rlzoo.callbacks.gvm import gradient_norms
from rlzoo.engines.base import weights_checksum
from rlzoo.loop import updates_of
from rlzoo.models.gather import gathered
from rlzoo.models.policy import load_policy
from rlzoo.ranks import exchange as distributed
from rlzoo.strategies import FSDP, DeepSpeed, ddp
from rlzoo.types import Rollouts, Update
from tests.conftest import make_tiny_model
from tests.recorded import recorded_rollouts
from tests.zoo import build, split

STRATEGIES = {
    "ddp": ddp,
    "fsdp": FSDP,
    "zero1": lambda: DeepSpeed(stage=1),
    "zero2": lambda: DeepSpeed(stage=2),
    "zero3": lambda: DeepSpeed(stage=3, persistence_threshold=0),
    "zero3_offload": lambda: DeepSpeed(stage=3, persistence_threshold=0, offload=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained on: a rollout step of uneven groups, or one of which a single one trains."""

    algo: str
    parts: int = 1  # microbatches of an update, about
    changes: tuple = ()  # of the algorithm's options
    rights: int = 5  # rollouts of ten that are right
    clip: float | None = None
    poison: bool = False  # makes the first update's gradient not finite
    tied: bool = False
    lora: bool = False
    updates: int = 1
    checkpointing: bool = False  # recomputes activations in the backward pass
    attention: str = "auto"
    decay: bool = False  # momentum and weight decay, which move weights without a gradient too
    precision: str = "32-true"
    lopsided: bool = (
        False  # all microbatches but the first are a 600th of it, lost in a sum of bfloat16
    )

    @property
    def name(self) -> str:
        parts = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None)]
        return ",".join(parts).replace("/", "_")


CASES = [
    Case("grpo", parts=4),
    Case("raft", parts=2, changes=(("rejected", "drop"),), rights=1),  # a rank has nothing
    Case("grpo", parts=2, tied=True, changes=(("kl_coef", 0.2),)),
    Case("grpo", parts=2, checkpointing=True),
    Case("ppo", parts=2, clip=0.05),
    Case("ppo", changes=(("critic_warmup", 99),)),
    Case("iterative_dpo", parts=2),
    Case("grpo", parts=2, tied=True, attention="sdpa"),  # padded rows
    Case("grpo", parts=2, tied=True, lora=True, updates=2, changes=(("kl_coef", 0.2),)),
    Case("raft", changes=(("rejected", "drop"),), rights=0, decay=True),  # nothing to learn from
    Case("grpo", poison=True, decay=True, updates=2),  # the first update is skipped
]
# Where the optimizer lies is all that is other: parts, groups, adapters, a step that is skipped.
OFFLOADED = [case for case in CASES if case.parts == 4 or case.clip or case.lora or case.poison]
TRIED = [
    (name, case)
    for name in STRATEGIES
    for case in (OFFLOADED if name == "zero3_offload" else CASES)
]

# 31 / 600 of the gradient are in microbatches that bfloat16 loses one by one.
HALF = Case("grpo", changes=(("kl_coef", 0.2),), precision="bf16-mixed", lopsided=True)
FACTOR = 1 / 600


class OneStep(lightning.LightningDataModule):
    """Hands out the microbatches of one recorded rollout step."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def rollouts(self) -> Rollouts:
        rollouts = recorded_rollouts((3, 1, 4, 2))
        rewards = torch.zeros(10)
        rewards[[0, 3, 4, 5, 8][: self.case.rights]] = 1.0
        return dataclasses.replace(rollouts, rewards=rewards)

    def train_dataloader(self) -> "OneStep":
        return self

    def __len__(self) -> int:
        return self.case.updates

    def __iter__(self) -> Iterator[Update]:
        algo, rollouts = self.trainer.lightning_module, self.rollouts()
        algo.must_score_old = lambda first: True
        split(algo, rollouts, self.case.parts, self.trainer.world_size)
        updates = updates_of(rollouts, algo)
        if self.case.parts > 1 and self.case.rights > 1:
            assert all(len(update.microbatches) > 1 for update in updates)
        for batch in updates[0].microbatches if self.case.poison else []:
            batch.advantages = batch.advantages * float("nan")
        if self.case.lopsided:
            (first, *_) = updates[0].microbatches
            small = first.replaced(advantages=FACTOR * first.advantages)
            updates = [Update([first, *[small] * 31], 0, True)]
        yield from updates


def policy_folder(folder: Path, tied: bool) -> Path:
    """A directory with the tiny model, as transformers saves it."""
    path = folder / f"policy_tied_{tied}"
    if not path.exists():
        make_tiny_model(spread=0.1, tied=tied).save_pretrained(path)
    return path


def made(case: Case, folder: Path) -> PolicyAlgorithm:
    path = str(policy_folder(folder, case.tied))
    changes = {"updates": case.updates} | dict(case.changes)
    policy = functools.partial(
        load_policy,
        path,
        lora={"r": 4} if case.lora else None,
        gradient_checkpointing=case.checkpointing,
        attention=case.attention,
    )
    algo = build(case.algo, policy=policy, configure=False, **changes)
    if case.decay:
        kind = functools.partial(torch.optim.SGD, lr=1.0, momentum=0.9, weight_decay=0.1)
        algo.optimizer_factory = kind
    return algo


def one_step(
    case: Case, strategy: object, devices: int, folder: Path, accelerator: str = "cpu"
) -> dict[str, Tensor]:
    """The weights after the case's updates, whole, and what else must agree over strategies."""
    return fit(case, strategy, devices, folder, accelerator).callbacks[0].found


def fit(
    case: Case, strategy: object, devices: int, folder: Path, accelerator: str = "cpu"
) -> lightning.Trainer:
    """A Trainer that has made the case's updates."""
    torch.manual_seed(0)  # a run's seed, which adapters start from
    algo, data = made(case, folder), OneStep(case)
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=case.precision,
        max_epochs=1,
        gradient_clip_val=case.clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Last()],
    )
    trainer.fit(algo, datamodule=data)
    return trainer


class Last(lightning.Callback):
    """Reads everything off while the strategy still stands."""

    def on_train_end(self, trainer: lightning.Trainer, algo: PolicyAlgorithm) -> None:
        data = trainer.datamodule
        critic = (pair for pair in algo.named_parameters() if pair[0].startswith("critic."))
        self.found = {name: tensor.clone() for name, tensor in algo.named_weights()}
        self.found |= {name: tensor.clone() for name, tensor in gathered(critic)}
        norms = gradient_norms(
            algo.policy, data.rollouts(), [0, 4, 5], temperature=1.0, max_tokens=60
        )
        grads = {k: v for norms_ in algo.grad_norms for k, v in norms_.items()}
        self.found |= {
            "head_norms": norms,
            "grad_norms": torch.tensor([grads.get(k, 0.0) for k in ("policy", "critic")]),
            "counts": torch.tensor([algo.ledger.counts[k] for k in COUNTED]),
            "checksum": torch.tensor(weights_checksum(algo.named_weights())),
            "ref_kl": torch.tensor(float(algo.means.compute().get("ref_kl", 0.0))),
        }


COUNTED = ("updates", "skipped/empty", "skipped/non_finite")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, make in STRATEGIES.items():
        cases = [case for tried, case in TRIED if tried == name]
        found = {case.name: one_step(case, make(), world_size, folder) for case in cases}
        if rank == 0:
            torch.save(found, folder / f"{name}.pt")
        found = one_step(HALF, make(), world_size, folder)
        if rank == 0:
            torch.save(found, folder / f"{name}_half.pt")
    torch.save(talked(rank, world_size, folder), folder / f"talked_{rank}.pt")


def talked(rank: int, world_size: int, folder: Path) -> list[dict[str, object]]:
    """What ranks exchange and over what, in two process groups that pass for nccl's."""
    own_backend, found = dist.get_backend, []
    gather, used = dist.all_gather_object, []
    kept: object = None  # the groups of the life before, which may be there when the next begins

    def gathered_over(items: list[object], item: object, group: dist.ProcessGroup) -> None:
        used.append(group)
        gather(items, item, group=group)

    for life in range(2):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/life{life}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=77),
        )
        used.clear()
        with (
            mock.patch.object(dist, "get_backend", lambda *group: "nccl"),
            mock.patch.object(dist, "all_gather_object", gathered_over),
        ):
            heard = [distributed.all_gather((life, rank, "x" * 9999 * rank)) for _ in range(2)]
            group, again = distributed.talking_group(), distributed.talking_group()
        timeout = group._get_backend(torch.device("cpu")).options._timeout
        found.append(
            {
                "heard": [[item[:2] for item in items] for items in heard],
                "apart": group is not dist.group.WORLD and group is again,
                "over": all(one is group for one in used),
                "backend": own_backend(group),
                "seconds": timeout.total_seconds(),
            }
        )
        kept = dist.group.WORLD, group
    del kept
    used.clear()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
