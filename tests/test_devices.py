"""Why there is no GPU, told at start-up: torch's build, the driver, what hides the cards."""

import pytest
import torch
from omegaconf import OmegaConf

from rlzoo.errors import UserError
from rlzoo.launch import devices
from rlzoo.launch.processes import check_processes


@pytest.mark.parametrize(
    "cuda, driver, words",
    [
        (None, "580.65.06", "a build for CPUs. .*REQUIREMENTS=requirements/cuda.txt"),
        ("13.0", None, "no NVIDIA driver is loaded"),
        ("13.0", "575.57.08", "driver is 575.57.08, .*CUDA 13.0, which needs 580 or later"),
        ("12.8", "520.61.05", "needs 525 or later"),
        ("13.0", "580.65.06", "driver 580.65.06 is new enough .*CUDA_VISIBLE_DEVICES='9'"),
        ("14.1", "580.65.06", "new enough"),  # of a major version that is not known here
    ],
)
def test_what_keeps_torch_from_a_gpu_is_told_before_anything_starts(
    cuda, driver, words, tmp_path, monkeypatch
):
    file = tmp_path / "version"
    if driver is not None:
        file.write_text(f"{driver}\n")
    monkeypatch.setattr(devices, "DRIVER", file)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # NVML counts them all the same
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    trainer = OmegaConf.create({"devices": 1, "num_nodes": 1, "accelerator": "gpu"})
    with pytest.raises(UserError, match=f"trainer.accelerator=gpu cannot be: .*{words}"):
        check_processes(trainer, sweep=False)
    check_processes(OmegaConf.merge(trainer, {"accelerator": "cpu"}), sweep=False)


def test_where_torch_has_a_gpu_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "driver_version", lambda file: "1.0")
    assert devices.why_no_cuda() is None


def test_more_gpus_than_there_are_names_their_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    trainer = OmegaConf.create({"devices": 3, "num_nodes": 1, "accelerator": "gpu"})
    with pytest.raises(UserError, match="trainer.devices=3 GPUs were asked for, .*sees 2"):
        check_processes(trainer, sweep=False)
