"""What each rank does in benchmarks/checkpoint.py: a training loop with a state, saved by one
contestant.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import Store
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from harness import status_bytes
from holdfast.checkpoint import Checkpointer

COLUMNS = 1024


class Contestant(Protocol):
    """A way to save; times are those that the training thread spends in it."""

    def save(self, step: int) -> None: ...
    def before_update(self) -> None: ...
    def finish(self) -> None: ...


@contextlib.contextmanager
def default_group(rank: int, world_size: int, store: Store) -> Iterator[Any]:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def build(mesh: Any, tensors: int, rows: int, dim: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    """`tensors` parameters of rows x COLUMNS fp32 as DTensors, with AdamW's moments."""
    module = nn.Module()
    size = mesh.size()
    for number in range(tensors):
        local = [rows, COLUMNS]
        local[dim] //= size
        values = torch.full(local, 1.0 + number)
        parameter = nn.Parameter(DTensor.from_local(values, mesh, [Shard(dim)]))
        module.register_parameter(f"w{number}", parameter)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter.detach(), 1e-3)
    optimizer.step()
    return module, optimizer


def state_dict(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The same tensors as Checkpointer saves, flat, for the peers."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        found[name] = parameter.detach()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}.{name}"] = optimizer.state[parameter][kind]
    return found


class Ours:
    def __init__(self, folder: Path, module: nn.Module, optimizer: Any, arena: int) -> None:
        state = {"model": module, "optimizer": optimizer}
        self._checkpointer = Checkpointer(folder, state, keep=1, arena_bytes=arena)

    def save(self, step: int) -> None:
        self._checkpointer.save(step)

    def before_update(self) -> None: ...

    def finish(self) -> None:
        self._checkpointer.wait()
        self._checkpointer.close()


class DcpSync:
    def __init__(self, folder: Path, module: nn.Module, optimizer: Any) -> None:
        self._folder, self._state = folder, lambda: state_dict(module, optimizer)

    def save(self, step: int) -> None:
        dcp.save(self._state(), checkpoint_id=str(self._folder / str(step)))
        _drop(self._folder, step - 1)

    def before_update(self) -> None: ...

    def finish(self) -> None: ...


class DcpAsync(DcpSync):
    _running: Any = None

    def save(self, step: int) -> None:
        self.finish()
        self._running = dcp.async_save(self._state(), checkpoint_id=str(self._folder / str(step)))
        _drop(self._folder, step - 2)

    def finish(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None


class TorchSnapshot(DcpSync):
    _running: Any = None

    def save(self, step: int) -> None:
        import torchsnapshot

        self.finish()
        state = {"state": torchsnapshot.StateDict(**_local(self._state()))}
        self._running = torchsnapshot.Snapshot.async_take(str(self._folder / str(step)), state)
        _drop(self._folder, step - 2)

    def finish(self) -> None:
        if self._running is not None:
            self._running.wait()
            self._running = None


class TorchCheckpointing(DcpSync):
    _running: Any = None

    def __init__(self, folder: Path, module: nn.Module, optimizer: Any) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().__init__(folder, module, optimizer)
        config = CheckpointManager.Config.with_async_save()
        # Its direct I/O fails here: the last, unaligned write is refused with EINVAL.
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = config.build()

    def save(self, step: int) -> None:
        if self._running is not None:
            self._running.result()
        self._running = self._manager.save(
            str(self._folder / str(step)), {"state": _local(self._state())}
        )
        _drop(self._folder, step - 2)

    def before_update(self) -> None:
        with self._manager.lock():
            pass

    def finish(self) -> None:
        if self._running is not None:
            self._running.result()
        self._manager.close()


def _local(state: dict[str, Any]) -> dict[str, Tensor]:
    """For those that do not take DTensors on CPU, or not without a resharder: as many bytes."""
    return {name: value.to_local() for name, value in state.items()}


def _drop(folder: Path, step: int) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(folder / str(step), ignore_errors=True)


def contestant(name: str, folder: Path, module: nn.Module, optimizer: Any, share: int) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "holdfast": lambda: Ours(folder, module, optimizer, 0),
        "holdfast, arena 1/4": lambda: Ours(folder, module, optimizer, share // 4),
        "dcp.save": lambda: DcpSync(folder, module, optimizer),
        "dcp.async_save": lambda: DcpAsync(folder, module, optimizer),
        "torchsnapshot": lambda: TorchSnapshot(folder, module, optimizer),
        "torch_checkpointing": lambda: TorchCheckpointing(folder, module, optimizer),
    }
    return makers[name]()


def loop(
    rank: int,
    world_size: int,
    store: Store,
    *,
    name: str,
    folder: str,
    tensors: int,
    rows: int,
    steps: int,
    every: int,
    compute_s: float,
) -> dict[str, float]:
    """Train `steps` steps of emulated compute and real updates; seconds blocked, of the loop,
    and in all.
    """
    with default_group(rank, world_size, store) as mesh:
        module, optimizer = build(mesh, tensors, rows)
        share = 12 * tensors * rows * COLUMNS // world_size
        saving = contestant(name, Path(folder), module, optimizer, share)
        if saving is not None:
            # The first save makes plans, processes and buffers; what is measured is the steady
            # state.
            saving.save(0)
            if hasattr(saving, "_checkpointer"):
                saving._checkpointer.wait()
            elif hasattr(saving, "_running") and saving._running is not None:
                saving._running.result() if hasattr(saving._running, "result") else saving.finish()
        dist.barrier()
        began = time.perf_counter()
        blocked = 0.0
        for step in range(1, steps + 1):
            time.sleep(compute_s)
            if saving is not None:
                start = time.perf_counter()
                saving.before_update()
                blocked += time.perf_counter() - start
            optimizer.step()
            if saving is not None and step % every == 0:
                start = time.perf_counter()
                saving.save(step)
                blocked += time.perf_counter() - start
        looped = time.perf_counter() - began
        if saving is not None:
            saving.finish()
        dist.barrier()
        ended = time.perf_counter() - began
    peak = status_bytes("VmHWM")
    return {"blocked": blocked, "loop": looped, "end": ended, "peak": peak}


def load(
    rank: int,
    world_size: int,
    store: Store,
    *,
    name: str,
    folder: str,
    tensors: int,
    rows: int,
    dim: int,
    cold: bool,
) -> dict[str, float]:
    """Load what `loop` or `make` has saved, into shards along `dim`; seconds and bytes read from
    storage.
    """
    with default_group(rank, world_size, store) as mesh:
        module, optimizer = build(mesh, tensors, rows, dim)
        state = state_dict(module, optimizer)
        if cold and rank == 0:
            drop_page_cache(Path(folder))
        dist.barrier()
        read_before = bytes_read()
        began = time.perf_counter()
        if name == "holdfast":
            checkpointer = Checkpointer(folder, {"model": module, "optimizer": optimizer})
            assert checkpointer.load() is not None
            assert checkpointer.load_statistics is not None
            read_before -= checkpointer.load_statistics.read_bytes
        else:
            dcp.load(state, checkpoint_id=str(folder))
        dist.barrier()
        seconds = time.perf_counter() - began
        value = float(state["w0"].to_local().view(-1)[0])
        return {"seconds": seconds, "read": bytes_read() - read_before, "value": value}


def make(rank: int, world_size: int, store: Store, *, folder: str, tensors: int, rows: int) -> None:
    """Save one state with both formats, for `load`."""
    with default_group(rank, world_size, store) as mesh:
        module, optimizer = build(mesh, tensors, rows)
        with Checkpointer(
            Path(folder) / "holdfast", {"model": module, "optimizer": optimizer}
        ) as one:
            one.save(1, wait=True)
        dcp.save(state_dict(module, optimizer), checkpoint_id=str(Path(folder) / "dcp"))


def write_once(
    rank: int, world_size: int, store: Store, *, folder: str, tensors: int, rows: int
) -> float:
    """Seconds from the beginning of a save to its commit, nothing else going on."""
    with default_group(rank, world_size, store) as mesh:
        module, optimizer = build(mesh, tensors, rows)
        with Checkpointer(Path(folder), {"model": module, "optimizer": optimizer}, keep=1) as one:
            one.save(1, wait=True)
            dist.barrier()
            began = time.perf_counter()
            one.save(2)
            one.wait()
            dist.barrier()
            return time.perf_counter() - began


def bytes_read() -> int:
    """What this process asked to read, from device or page cache."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def drop_page_cache(folder: Path) -> None:
    """Forget the folder's pages, so that the next reads come from the device."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
