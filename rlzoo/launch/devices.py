"""Why torch sees no GPU where one was asked for: its build, the driver, or what hides the cards."""

from __future__ import annotations

import os
from pathlib import Path

import torch

DRIVER = Path("/sys/module/nvidia/version")  # of the kernel's module, "580.65.06"
OLDEST = {12: 525, 13: 580}  # driver that a major version of CUDA needs; NVIDIA's release notes
LOCKED = "requirements/cuda.txt (make venv REQUIREMENTS=requirements/cuda.txt)"


def why_no_cuda() -> str | None:
    """What keeps torch from the GPUs, with the mend; None where it can use one."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda
    if built is None:
        return (
            f"torch {torch.__version__} is a build for CPUs. On a machine with a GPU install"
            f" {LOCKED}."
        )
    driver = driver_version(DRIVER)
    if driver is None:
        return "no NVIDIA driver is loaded here (nvidia-smi would say the same). Install one."
    oldest = OLDEST.get(int(built.partition(".")[0]))
    if oldest is not None and int(driver.partition(".")[0]) < oldest:
        return (
            f"the NVIDIA driver is {driver}, but torch {torch.__version__} is built for CUDA"
            f" {built}, which needs {oldest} or later. Update the driver; rlzoo's locked packages"
            " have no older build."
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        f"driver {driver} is new enough for torch's CUDA {built}, but no card is to be seen"
        + ("" if hidden is None else f" with CUDA_VISIBLE_DEVICES={hidden!r}")
        + ". Look at nvidia-smi, and whether this process may open /dev/nvidia*."
    )


def driver_version(file: Path) -> str | None:
    """Of NVIDIA's kernel module; None where none is loaded."""
    try:
        return file.read_text().strip()
    except OSError:
        return None
