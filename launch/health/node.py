"""The health of this node by itself: all checks, one after the other."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from holdfast.launch.health.clocks import check_clocks
from holdfast.launch.health.disks import check_disk
from holdfast.launch.health.memory import check_memory
from holdfast.launch.health.products import check_cores, check_device
from holdfast.launch.health.report import Check, HealthReport
from holdfast.launch.health.versions import check_versions
from holdfast.launch.machine_errors import MachineRoots
from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.step import choose_device, plan_of, state_format
from holdfast.trainer.terms import make_certificate

RUN, CHECKPOINTS, OFFLOAD = "run", "checkpoints", "offload"
"""The parts that folders have in a run."""
_SMALL = {"model": {"family": "llama", "layers": 2, "hidden": 64, "intermediate": 128}}
"""A model for the certificate where no run is named."""


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What is looked at on a node, and how much."""

    config: RunConfig | None = None
    """The run whose operations are certified; None: a small model's."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """By the part in a run: a folder whose disk is measured."""
    memory_mib: int = 256
    """The memory of each device that is tested; 0: none."""
    disk_mib: int = 64
    """What is written to each disk and read again: a multiple of 4; 0: no disk is measured."""
    name: str = ""
    """The name of the node; empty: its host's."""
    roots: MachineRoots = field(default_factory=MachineRoots)


def check_node(settings: NodeSettings) -> HealthReport:
    """Look at this node. Local; takes seconds, and uses its devices and disks meanwhile."""
    config = settings.config or convert_config(_SMALL)
    gpus = _gpus()
    checks = check_versions()
    if settings.memory_mib:
        tested_bytes = settings.memory_mib << 20
        checks += [check_memory(d, tested_bytes) for d in (torch.device("cpu"), *gpus)]
    for part, folder in settings.folders.items() if settings.disk_mib else ():
        needed = checkpoint_bytes(config) if settings.config and part == CHECKPOINTS else 0
        checks += check_disk(part, folder, settings.disk_mib << 20, needed)
    checks += check_cores(trains=not gpus)
    for device in gpus:
        checks += check_device(device)
    checks += check_clocks(settings.roots)
    checks += _certificate(config, gpus)
    return HealthReport(settings.name or socket.gethostname(), tuple(checks))


def folders_of(config: RunConfig, run: Path, checkpoints: Path) -> dict[str, Path]:
    """The folders of a run whose disks are measured, by their part in it. Pure.

    Args:
        checkpoints: where its checkpoints lie on a local disk.
    """
    found = {RUN: run, CHECKPOINTS: checkpoints}
    if config.offload.activations == "ssd":
        found[OFFLOAD] = Path(config.offload.path or tempfile.gettempdir())
    return found


def checkpoint_bytes(config: RunConfig) -> int:
    """The size of a checkpoint of a run: the room that its disk needs. Pure."""
    elements = sum(
        spec.elements
        for layer in plan_of(config).layers
        for index, specs in enumerate(layer.parameters)
        for spec in specs
        if spec.is_first(index)
    )
    form = state_format(config)
    return elements * (form.precision.bytes + form.saved_bytes)


def _gpus() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", number) for number in range(count)]


def _certificate(config: RunConfig, gpus: list[torch.device]) -> list[Check]:
    """The hashes of what each device computes in the operations of a run."""
    train = msgspec.structs.replace(config.train, compile=False)  # a run compiles in its workers
    config = msgspec.structs.replace(config, train=train)
    numbers = range(len(gpus)) if config.train.device != "cpu" and gpus else (0,)
    return [
        Check(f"certificate of {device}: {kind}", digest, comparison="equal")
        for device in (choose_device(config, number) for number in numbers)
        for kind, digest in make_certificate(config, device).items()
    ]
