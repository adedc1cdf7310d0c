"""Memory of weights, gradients and optimizer states on each rank, under each strategy.

    python -m rlzoo.bench memory [--ranks 2] [--width 256] [--layers 8] [--precision 32-true]

Counts the bytes of tensors that live in each process (storages, each once) at three moments of an
optimizer step with AdamW, not resident memory, which holds code and freed blocks too: once training
is set up, when the gradient is complete, and after the step. Their differences are compared with
ZeRO's
formula, `rlzoo.models.memory.states`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from rlzoo.algos import PolicyAlgorithm
from rlzoo.models.memory import PARTS, Held, states
from rlzoo.report.ledger import Ledger
from rlzoo.strategies import FSDP, DeepSpeed, ddp

BUCKET = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}  # elements: next to none


def strategies() -> dict[Held, Any]:
    zero3 = BUCKET | {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
    del zero3["allgather_bucket_size"]
    return {
        "ddp": ddp(),
        "fsdp": FSDP(),
        "zero1": DeepSpeed(stage=1, options=BUCKET),
        "zero2": DeepSpeed(stage=2, options=BUCKET),
        "zero3": DeepSpeed(stage=3, persistence_threshold=0, options=zero3),
    }


def tensor_bytes() -> int:
    """Bytes of all tensors alive in this process, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor):
            local = getattr(item, "_local_tensor", item)
            for tensor in (
                local,
                getattr(local, "ds_tensor", None),
                local.grad if local.is_leaf else None,
            ):
                if tensor is not None:
                    tensor = getattr(tensor, "_local_tensor", tensor)
                    storages[tensor.untyped_storage().data_ptr()] = (
                        tensor.untyped_storage().nbytes()
                    )
    storages.pop(0, None)
    return sum(storages.values())


class Measured(PolicyAlgorithm):
    """One language-modelling step, with a look at memory at three moments of it."""

    def __init__(self, folder: str) -> None:
        optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-4, foreach=False)  # noqa: E731
        policy = lambda: AutoModelForCausalLM.from_pretrained(folder)  # noqa: E731
        super().__init__(policy, optimizer, None, max_skipped_updates=0)
        self.seen: dict[str, int] = {}
        self.before = tensor_bytes()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (tokens,) = batch
        if not self.seen:
            self.seen["weights"] = tensor_bytes() - self.before
        loss: Tensor = self.policy(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def settle_update(self, norms: dict[str, float]) -> str | None:
        self.seen.setdefault("gradients", tensor_bytes() - self.before - self.seen["weights"])
        return super().settle_update(norms)

    def on_train_batch_end(self, *args: Any) -> None:
        self.zero_grad(set_to_none=True)
        self.seen.setdefault("optimizer", tensor_bytes() - self.before - self.seen["weights"])


class Data(lightning.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.arange(32).view(2, 16)), batch_size=2)


def measure(name: Held, folder: str, ranks: int, precision: Any) -> dict[str, int]:
    module = Measured(folder)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategies()[name],
        precision=precision,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Data())
    if name.startswith("zero"):  # what it sets aside from the start goes where it belongs
        assert isinstance(trainer.strategy, DeepSpeed)
        optimizer = trainer.strategy.deepspeed_engine.optimizer
        buffer = getattr(optimizer, "grad_partitions_flat_buffer", torch.zeros(0))
        early = {
            "optimizer": master_bytes(optimizer),
            "gradients": buffer.untyped_storage().nbytes(),
        }
        for part, size in early.items():
            module.seen["weights"] -= size
            module.seen[part] += size
    return module.seen


def master_bytes(optimizer: Any) -> int:
    """Bytes of a ZeRO optimizer's float32 partitions."""
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    flats = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    return sum(flat.untyped_storage().nbytes() for flat in flats)


def make_model(folder: str, width: int, layers: int) -> int:
    """Saves a random Qwen2 and returns how many parameters it has."""
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def on_rank(arguments: argparse.Namespace) -> None:
    """Measures one strategy as one rank of several; rank 0 prints the largest rank's bytes."""
    from rlzoo.ranks.exchange import all_gather

    seen = measure(arguments.strategy, arguments.folder, arguments.ranks, arguments.precision)
    largest = {part: max(rank[part] for rank in all_gather(seen)) for part in PARTS}
    if arguments.rank == 0:
        print("MEASURED " + json.dumps(largest), flush=True)


def launch(arguments: argparse.Namespace, name: str, folder: str, port: int) -> dict[str, int]:
    """Bytes on the fullest rank under a strategy, from fresh processes."""
    ranks = arguments.ranks
    command = [sys.executable, "-m", "rlzoo.bench", "memory", "--strategy", name]
    command += ["--folder", folder, "--ranks", str(ranks), "--precision", arguments.precision]
    processes = []
    for rank in range(ranks):
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "GROUP_RANK": 0}
        facts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench"}
        facts |= {"LOCAL_WORLD_SIZE": ranks, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
        processes.append(
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env=os.environ | {key: str(value) for key, value in facts.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    for line in outputs[0].splitlines():
        if line.startswith("MEASURED "):
            sizes: dict[str, int] = json.loads(line.removeprefix("MEASURED "))
            return sizes
    raise RuntimeError(f"{name} ended without a figure:\n{outputs[0][-2000:]}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench memory")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--width", type=int, default=256, help="of hidden states")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--precision", default="32-true", help="32-true or bf16-mixed")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank is not None:
        on_rank(arguments)
        return
    half = arguments.precision == "bf16-mixed"
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        count = make_model(folder, arguments.width, arguments.layers)
        print(
            f"{count:,} parameters, {arguments.ranks} ranks, {arguments.precision};"
            " MB on the fullest rank"
        )
        print(f"{'':7}" + "".join(f"{part:>12} {'formula':>9} {'ratio':>6}" for part in PARTS))
        for place, name in enumerate(strategies()):
            if half and not name.startswith("zero"):
                continue
            found = launch(arguments, name, folder, 29700 + (os.getpid() + place) % 250)
            formula = states(name, count, arguments.ranks, half)
            ratios = {part: found[part] / formula[part] for part in PARTS}
            figures |= {f"{name}_{part}": ratios[part] for part in PARTS}
            cells = (
                f"{found[p] / 1e6:12.2f} {formula[p] / 1e6:9.2f} {ratios[p]:6.3f}" for p in PARTS
            )
            print(f"{name:7}" + "".join(cells), flush=True)
    worst = max(abs(ratio - 1) for ratio in figures.values())
    print(json.dumps({"worst_off_formula": worst, **figures}))


if __name__ == "__main__":
    main(sys.argv[1:])
