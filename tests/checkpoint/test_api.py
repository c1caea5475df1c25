"""The library: any module and optimizer, FSDP2 too, judged by training that never stops."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store

from holdfast.checkpoint import Checkpointer, load, save
from holdfast.checkpoint.saving import save as saving
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.parallel.errors import CheckpointError
from support.processes.cluster import Cluster


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Linear(24, 13), nn.Linear(13, 4)
    )


def _parts(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = _model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05 if seed == 0 else 0.5)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)


def _train(model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(16, 8, generator=generator)
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("optimizer_type", ["adamw", "sgd", "adamw fused"])
def test_a_plain_program_goes_on_as_if_it_had_never_stopped(
    tmp_path: Path, optimizer_type: str
) -> None:
    def parts(seed: int) -> tuple[nn.Module, Any, Any]:
        model, optimizer, _ = _parts(seed)
        if optimizer_type == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        elif optimizer_type == "adamw fused":
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)

    model, optimizer, scheduler = parts(0)
    expected = _train(model, optimizer, scheduler, range(10))
    model, optimizer, scheduler = parts(0)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "note": "kept"}
    with Checkpointer(tmp_path, state, keep=2) as checkpointer:
        for step in range(6):
            _train(model, optimizer, scheduler, range(step, step + 1))
            checkpointer.save(step + 1)
        checkpointer.wait()
    assert [path.name for path in LocalStore(tmp_path).paths()] == [
        "step-00000005",
        "step-00000006",
    ]
    assert verify_checkpoint(tmp_path / "step-00000006") == []
    model, optimizer, scheduler = parts(1)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpointer = Checkpointer(tmp_path, state)
    assert checkpointer.load() == 6
    assert checkpointer.loaded["note"] == "kept"
    assert _train(model, optimizer, scheduler, range(6, 10)) == expected[6:]
    checkpointer.close()


def test_the_last_checkpoint_can_still_be_read_when_the_next_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "READERS_S", 1000.0)
    with Checkpointer(tmp_path, {"a": torch.ones(3)}, keep=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step)
            checkpointer.wait()
        assert [path.name for path in LocalStore(tmp_path).paths()] == [
            "step-00000001",
            "step-00000002",
        ]
        checkpointer.save(3)  # which has room for it made first
        checkpointer.wait()
        assert not (tmp_path / "step-00000001").exists()
    assert [path.name for path in LocalStore(tmp_path).paths()] == ["step-00000003"]


def test_the_copy_is_of_the_moment_of_saving(tmp_path: Path) -> None:
    """What training changes right after `save` returns must not reach the checkpoint."""
    model, optimizer, _ = _parts()
    _train(model, optimizer, None, range(2))
    at_save = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}) as checkpointer:
        checkpointer.save(2)
        _train(model, optimizer, None, range(2, 9))
        checkpointer.wait()
    names = {name: id(p) for name, p in model.named_parameters()}
    again, other, _ = _parts(1)
    load(tmp_path, {"model": again, "optimizer": other})
    for name, value in again.state_dict().items():
        assert torch.equal(value, at_save[name]), name
    for name, parameter in again.named_parameters():
        for kind, value in other.state[parameter].items():
            assert torch.equal(value, moments[names[name]][kind]), (name, kind)


def test_without_an_optimizer_everything_is_copied_at_once(tmp_path: Path) -> None:
    values = torch.arange(100_000, dtype=torch.float32)
    odd = torch.arange(12).view(3, 4).t()
    with Checkpointer(tmp_path, {"values": values, "odd": odd}) as checkpointer:
        checkpointer.save(1)
        values.zero_()
        odd.zero_()
        checkpointer.wait()
    back = {"values": torch.empty(100_000), "odd": torch.empty(4, 3, dtype=torch.int64)}
    load(tmp_path, back)
    assert torch.equal(back["values"], torch.arange(100_000, dtype=torch.float32))
    assert torch.equal(back["odd"], torch.arange(12).view(3, 4).t())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16,
        torch.float8_e4m3fn, torch.complex64, torch.float64,
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 3)])
def test_any_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    value = raw.view(dtype).view(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
    state = {"ünïcode/name": value, "beside": torch.ones(3)}
    save(tmp_path, state, step=4)
    back = {"ünïcode/name": torch.empty_like(value), "beside": torch.zeros(3)}
    load(tmp_path, back)
    assert torch.equal(
        back["ünïcode/name"].contiguous().view(-1).view(torch.uint8),
        value.contiguous().view(-1).view(torch.uint8),
    )
    assert torch.equal(back["beside"], torch.ones(3))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.zeros(3)}, step=1)
    with pytest.raises(CheckpointError, match=r"shape \[4\], and the checkpoint's a has \[3\]"):
        load(tmp_path, {"a": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="a has dtype F32, and I64 is needed"):
        load(tmp_path, {"a": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="the checkpoint has nothing for b; it has a"):
        load(tmp_path, {"b": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="no module in the state has"):
        save(tmp_path, {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))])}, step=2)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(tmp_path / "nowhere", {"a": torch.zeros(3)})


@contextmanager
def _default_group(rank: int, world_size: int, store: Store) -> Iterator[None]:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def train_sharded(
    rank: int, world_size: int, store: Store, *, kind: str, folder: str, first: int, last: int
) -> dict[str, Tensor]:
    """Train under FSDP2, DDP or column and row sharding; the full parameters at the end."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    with _default_group(rank, world_size, store):
        torch.manual_seed(first)
        model: Any = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 13), nn.Linear(13, 4))
        mesh = init_device_mesh("cpu", (world_size,))
        if kind == "fsdp":
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        elif kind == "columns":
            for number, placement in ((0, Shard(1)), (2, Shard(0))):
                weight = model[number].weight
                sharded = distribute_tensor(weight.detach(), mesh, [placement])
                model[number].weight = nn.Parameter(sharded)
            for name, parameter in list(model.named_parameters()):
                if not isinstance(parameter, DTensor):
                    module = model.get_submodule(name.rpartition(".")[0])
                    replicated = distribute_tensor(parameter.detach(), mesh, [Replicate()])
                    setattr(module, name.rpartition(".")[2], nn.Parameter(replicated))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)
        with Checkpointer(folder, {"model": model, "optimizer": optimizer}) as checkpointer:
            found = checkpointer.load()
            assert (found or 0) == first, found
            for step in range(first, last):
                generator = torch.Generator().manual_seed(step)
                batch: Any = torch.randn(16, 8, generator=generator)
                if kind == "columns":
                    batch = distribute_tensor(batch, mesh, [Replicate()])
                loss = model(batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            checkpointer.save(last)
            checkpointer.wait()
        full = {}
        for name, parameter in model.named_parameters():
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            full[name.removeprefix("module.")] = value.clone()
        return full


@pytest.mark.mp
def test_fsdp_ddp_and_sharded_tensors_go_on_in_each_others_layouts(
    cluster: Cluster, tmp_path: Path
) -> None:
    """4-way FSDP2, 3-way FSDP2, DDP and column sharding, in turn, against one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 13), nn.Linear(13, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)
    ended: list[dict[str, Tensor]] = []
    for step in range(8):
        _train(model, optimizer, None, range(step, step + 1))
        if step % 2:
            ended.append({n: p.detach().clone() for n, p in model.named_parameters()})
    stages = [("fsdp", 4), ("fsdp", 3), ("ddp", 2), ("columns", 2)]
    for number, (kind, ranks) in enumerate(stages):
        results = cluster.run(
            f"{__name__}:train_sharded",
            ranks,
            kind=kind,
            folder=str(tmp_path),
            first=2 * number,
            last=2 * number + 2,
        )
        for full in results:
            for name, value in full.items():
                assert torch.allclose(value, ended[number][name], rtol=1e-4, atol=1e-5), (
                    kind,
                    name,
                )
        assert verify_checkpoint(tmp_path / f"step-{2 * number + 2:08d}") == []


def load_under_other_names(rank: int, world_size: int, store: Store, folder: str) -> int:
    """The bytes that this rank reads if each rank has a host name of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/self/ns/uts", os.O_RDONLY)
    if libc.unshare(0x04000000) != 0:  # CLONE_NEWUTS
        raise OSError(ctypes.get_errno(), "unshare")
    try:
        socket.sethostname(f"name-{rank}")
        with _default_group(rank, world_size, store):
            state = {"model": _model()}
            checkpointer = Checkpointer(folder, state)
            checkpointer.load()
            assert checkpointer.load_statistics is not None
            checkpointer.close()
            return checkpointer.load_statistics.read_bytes
    finally:
        libc.setns(here, 0)
        os.close(here)


@pytest.mark.mp
@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of host names needs root")
def test_ranks_of_one_machine_share_what_they_read_whatever_its_name(
    cluster: Cluster, tmp_path: Path
) -> None:
    save(tmp_path, {"model": _model()}, step=1)
    read = cluster.run(f"{__name__}:load_under_other_names", 2, folder=str(tmp_path))
    state = _model().state_dict().values()
    assert sum(read) == sum(value.numel() * value.element_size() for value in state)
