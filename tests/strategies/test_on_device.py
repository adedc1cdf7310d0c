"""Strategies over the exchange of a device (gloo, nccl), in bf16-mixed: an update is that of
float32 on a CPU but for its rounding, and a run saves, is exported and goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlzoo.models.policy import load_policy
from tests.conftest import make_tiny_model
from tests.devices import CUDA, TWO_GPUS
from tests.forked import free_port
from tests.strategies.on_device import CASE, EXCHANGED, TRIED
from tests.strategies.steps import Case, one_step, policy_folder
from tests.test_runs import ROOT, finish, start, start_anew, summary_of

pytestmark = pytest.mark.deepspeed
SLOW = pytest.param("cpu", marks=pytest.mark.slow)  # tests/strategies/test_steps.py has two ranks
RUN = (
    *("sampler=uniform", "engine=transformers", "val_every=0", "callbacks.validation=null"),
    *("datamodule.prompts_per_epoch=8", "datamodule.responses_per_prompt=2"),
    *("datamodule.responses_per_step=16", "algo.updates=2", "algo.kl_coef=1e-3"),
    *("trainer.precision=bf16-mixed", "reward.num_workers=1"),
)


def found_by(ranks: int, device: str, folder: Path) -> tuple[dict[str, dict[str, Tensor]], list]:
    """What `on_device` leaves, from processes of their own: a fork may have no part in CUDA."""
    policy_folder(folder, tied=False)
    shared = {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "0"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    command = [sys.executable, "-m", "tests.strategies.on_device", str(folder), device]
    said = [folder / f"said.{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, file in enumerate(said):
        variables = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with file.open("w") as out:
            streams = {"stdout": out, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, **streams))
    codes = [process.wait(timeout=300) for process in processes]
    assert not any(codes), "".join(file.read_text()[-3000:] for file in said)
    return torch.load(folder / "found.pt")


def check(ranks: int, device: str, folder: Path, record_property) -> None:
    found, sizes = found_by(ranks, device, folder)
    exact = one_step(Case("grpo", changes=CASE.changes), "auto", 1, folder)
    policy = dict(make_tiny_model(spread=0.1).named_parameters())
    moved = lambda of: torch.cat([(of[n].cpu() - p).flatten() for n, p in policy.items()]).detach()  # noqa: E731
    for name in TRIED:
        ours, theirs = moved(found[name]), moved(exact)
        cosine = float(torch.cosine_similarity(ours, theirs, dim=0))
        record_property(f"{name}_cosine", cosine)
        assert cosine > 0.999 and float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.02)
        assert found[name]["ref_kl"] < 1e-7
        norms = found[name]["head_norms"], exact["head_norms"]
        torch.testing.assert_close(*norms, rtol=0.02, atol=1e-5)
    assert sizes == ranks * [EXCHANGED[device]]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_one_rank_makes_the_update_of_float32(device, tmp_path, record_property):
    check(1, device, tmp_path, record_property)


@pytest.mark.parametrize("device", [SLOW, TWO_GPUS])
def test_two_ranks_make_the_update_of_float32(device, tmp_path, record_property):
    check(2, device, tmp_path, record_property)


@pytest.mark.parametrize(
    "device, strategy",
    [
        pytest.param("cpu", "deepspeed_zero2", marks=pytest.mark.slow),  # tests/test_resume.py
        *(
            pytest.param("cuda", name, marks=CUDA.marks)
            for name in ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp")
        ),
    ],
)
def test_a_run_of_one_rank_is_saved_exported_and_goes_on(device, strategy, tmp_path):
    there = ("trainer=gpu",) if device == "cuda" else ("trainer=cpu", "num_threads=1")
    options = (*there, *RUN, f"strategy={strategy}")
    begin = start_anew if device == "cuda" else start
    for steps, more in ((1, ()), (2, ("ckpt_path=last",))):
        run_dir = tmp_path / "run"
        finish(begin(run_dir, *options, f"limits.max_responses={16 * steps}", *more))
        assert summary_of(run_dir)["updates"] == 2 * steps
        assert load_policy(str(run_dir / "policy")).num_parameters() > 1e5
