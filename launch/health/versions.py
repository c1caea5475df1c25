"""The versions of what a run depends on, which are to be equal on all nodes."""

from __future__ import annotations

import platform

import torch

from holdfast.launch.health.report import Check
from holdfast.launch.machine_errors import gpu_states
from holdfast.trainer.terms import software_versions


def check_versions() -> list[Check]:
    """The versions on this node. Local.

    Nodes with other kernels compute the same: such a difference is told, and fails none.
    """
    found = {**software_versions(), **_of_gpus()}
    checks = [Check(f"version of {name}", text, comparison="equal") for name, text in found.items()]
    return [*checks, Check("version of the kernel", platform.release(), comparison="told")]


def _of_gpus() -> dict[str, str]:
    """The versions of the driver, CUDA and NCCL, as far as there are such."""
    found = {}
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    drivers = sorted({gpu.driver for gpu in gpu_states()})
    if drivers:
        found["the GPU's driver"] = ", ".join(drivers)
    return found
