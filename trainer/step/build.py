"""The opening of a run's training: its device, its transport, its communicators."""

from __future__ import annotations

import os
from typing import NamedTuple, assert_never

import torch
from torch import Tensor
from torch.distributed import Store

from holdfast.parallel.comm import Backend, FlightRecorder, build_groups
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.precision import PRECISIONS
from holdfast.parallel.reading import Count
from holdfast.trainer.config import RunConfig, machine_memory_bytes
from holdfast.trainer.models import (
    RegionSizes,
    compile_regions,
    family_of,
    import_compiler,
    mark_compiling,
)
from holdfast.trainer.step.planning import plan_of
from holdfast.trainer.step.training import Training
from holdfast.trainer.worlds import WorldInfo


def open_training(config: RunConfig, world: WorldInfo, store: Store) -> Training:
    """The training of a run with fixed ranks. Collective over all workers."""
    plan = plan_of(config)
    device = choose_device(config, world.local_rank)
    compile_model(config, device)
    groups = build_groups(
        store,
        world.store_host,
        world.rank,
        plan.stage_replicas.ranks,
        {
            **plan.axis_groups(world.rank),
            "pipeline": plan.configured_mesh.pipeline_group(world.rank),
        },
        backend=backend_of(config, device),
        generation=plan.generation,
    )
    mark_compilation(config, groups.recorder)
    return Training(config, world.rank, device, plan, groups)


def compile_model(config: RunConfig, device: torch.device) -> list[Tensor]:
    """Compile what `train.compile` compiles, before any rank waits for another one. Local.

    It takes as long as a step's passes through one layer if it has been compiled in this process.
    With `train.recompute` torch's checkpointing imports the compiler, too.

    Returns:
        Results of the compiled code, which are equal on ranks that compute the same bits; empty if
        nothing is compiled.
    Raises:
        ConfigError: torch cannot compile on this machine.
    """
    train, parallel = config.train, config.parallel
    if train.recompute != "none":
        import_compiler()
    regions = family_of(config.model.family).compiled_regions
    if not train.compile or regions is None:
        return []
    tokens = train.seq_len // train.context_chunks
    sizes = RegionSizes(
        tensor=config.tensor_parts,
        rows=tokens // (config.tensor_parts if parallel.sequence_parallel else 1),
        tokens=tokens,
        seq_len=train.seq_len,
        micro_batch=train.micro_batch,
        dtype=PRECISIONS[train.precision].dtype,
        device=device,
    )
    return compile_regions(regions(config.model, sizes), train.seed)


def mark_compilation(config: RunConfig, recorder: FlightRecorder) -> None:
    """Have this rank say in its flight record when it compiles. Once in a process; local."""
    if config.train.compile:
        mark_compiling(lambda: recorder.busy("compile", config.elastic.startup_grace_s))


def backend_of(config: RunConfig, device: torch.device) -> Backend:
    """The transport of the communicators."""
    if config.parallel.backend != "auto":
        return config.parallel.backend
    return "nccl" if device.type == "cuda" else "gloo"


def _require_device(local_rank: int, count: int) -> None:
    """Check that a rank has a GPU of its own.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks.
    """
    if local_rank >= count:
        raise ConfigError(
            f"train.device: rank {local_rank} of this machine needs GPU {local_rank}, and torch "
            f"sees {count}; start at most {count} ranks here (--nproc), or set train.device = 'cpu'"
        )


_PROBE, _PRODUCTS = 256, 8
"""The size of a probe's matrices, and the number of their products: some milliseconds of a core."""


class DeviceMemory(NamedTuple):
    """The memory of a rank's device."""

    bytes: Count = 0
    """0: not known."""
    is_shared: bool = False
    """Whether all ranks of its machine use it."""


UNKNOWN_MEMORY = DeviceMemory()


def device_memory(device: torch.device) -> DeviceMemory:
    """The memory of a device. Local."""
    if device.type == "cuda":
        return DeviceMemory(torch.cuda.get_device_properties(device).total_memory)
    return DeviceMemory(machine_memory_bytes(), is_shared=True)


def probe(device: torch.device) -> None:
    """Compute a few products, as a measure of a rank's speed, and wait for them. Local."""
    value = torch.ones(_PROBE, _PROBE, device=device)
    for _ in range(_PRODUCTS):
        value = value @ value / _PROBE
    value[0, 0].item()


def choose_device(config: RunConfig, local_rank: int) -> torch.device:
    """The device of this rank; sets threads and, in exact mode, deterministic kernels."""
    torch.set_num_threads(config.train.threads_per_rank)
    wanted = config.train.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if config.numerics.reduction == "exact":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # As use_deterministic_algorithms(True), which imports the compiler: a second per worker.
        torch.set_deterministic_debug_mode("error")
        # Every buffer here is written before it is read; filling them first would cost a pass each.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore
    match wanted:
        case "cpu":
            return torch.device("cpu")
        case "cuda":
            _require_device(local_rank, torch.cuda.device_count())
            torch.cuda.set_device(local_rank)
            return torch.device("cuda", local_rank)
        case unknown:
            assert_never(unknown)
