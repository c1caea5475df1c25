"""Offloaded activations: less memory, each storage sent once, and nothing wrong when drives
fail.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from holdfast.parallel.errors import ConfigError, OffloadError
from holdfast.parallel.offload import Bounds, Offloader
from holdfast.parallel.offload.stores.disk_file import DiskFile

ROWS, WIDTH = 64, 128
BYTES = ROWS * WIDTH * 4


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Offloader]]:
    """Offloaders that are closed at the end."""
    made: list[Offloader] = []

    def make(path: Path | None = tmp_path, **settings: Any) -> Offloader:
        offloader = Offloader(path, smallest_bytes=BYTES, **settings)
        made.append(offloader)
        return offloader

    yield make
    for offloader in made:
        offloader.close()


class Stack(nn.Module):
    """Layers whose every activation is of `BYTES` bytes."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.seen: list[StorageWeakRef] = []

    def forward(self, value: Tensor) -> Tensor:
        for layer in self.layers:
            value = layer(value).tanh()
            self.seen.append(StorageWeakRef(value.untyped_storage()))
        return value.square().mean()


def inputs() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module, total: Tensor) -> list[Tensor]:
    """The gradients of a loss; the model's own are left empty."""
    model.zero_grad()
    total.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def steps(model: nn.Module, offloader: Offloader, count: int = 4) -> list[list[Tensor]]:
    """The gradients of steps that send what they save, all written before the backward passes."""
    found = []
    for _ in range(count):
        with offloader:
            total = model(inputs())
            offloader.drain()
            found.append(gradients(model, total))
    return found


def test_memory_is_free_between_the_passes(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make()
    total = model(inputs())
    assert not any(reference.expired() for reference in model.seen)  # autograd keeps all of them
    expected = gradients(model, total)
    model.seen.clear()
    with offloader:
        total = model(inputs())
        offloader.drain()
        assert all(reference.expired() for reference in model.seen)
        found = gradients(model, total)
    assert equal(found, expected)
    report = offloader.last_step
    assert report.sent_bytes == report.eligible_bytes
    assert report.sent_bytes >= len(model.seen) * BYTES


def test_a_storage_goes_out_once_and_comes_back_once(make: Callable[..., Offloader]) -> None:
    weight = torch.randn(WIDTH, WIDTH).requires_grad_()
    offloader = make()
    with offloader:
        value = inputs() @ weight
        parts = value.view(2, ROWS // 2, WIDTH).unbind(0)
        total = (value * value).sum() + value.t().sigmoid().mul(value.t()).sum()
        total = total + (parts[0] * parts[1]).sum()
        del parts
        offloader.drain()
        sent = offloader._statistics().written_bytes
        del value
        total.backward()
    # The input, the product and the sigmoid; pages are written whole.
    assert offloader.last_step.sent_bytes == 3 * BYTES
    assert sent <= 3 * (BYTES + 4096)
    assert offloader.last_step.read_bytes <= 3 * (BYTES + 4096)


def test_what_belongs_to_others_stays(make: Callable[..., Offloader]) -> None:
    weight = torch.randn(WIDTH, WIDTH).requires_grad_()
    table, mask = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    small = torch.randn(WIDTH)
    offloader = make()
    offloader.keep(table)
    with offloader:
        total = (weight.t()[:ROWS] * table).sum() + (weight[:ROWS] * mask).sum()
        total = total + (weight[0] * small).sum()
        assert offloader._account.sent_bytes == BYTES
        offloader.drain()
        total.backward()
    # The mask was sent, for nothing: it still is in memory, is not read back, and stays from now
    # on.
    assert offloader.last_step.read_bytes == 0
    with offloader:
        (weight[:ROWS] * mask).sum().backward()
    assert offloader.last_step.sent_bytes == 0


def test_a_module_can_be_kept(make: Callable[..., Offloader]) -> None:
    module = nn.BatchNorm1d(BYTES)
    offloader = make()
    offloader.keep(module)
    held = {id(t) for t in (*module.parameters(), *module.buffers())}
    assert len(offloader._held) == len(held)


def test_a_change_after_saving_is_an_error_even_when_the_bytes_are_away(
    make: Callable[..., Offloader],
) -> None:
    weight = torch.randn(WIDTH, WIDTH).requires_grad_()
    offloader = make()
    with offloader:
        value = inputs() @ weight
        total = value.square().sum()
        offloader.drain()
        value.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


def test_a_changed_tensor_is_saved_again(make: Callable[..., Offloader]) -> None:
    weight = torch.randn(WIDTH, WIDTH).requires_grad_()

    def run() -> Tensor:
        value = (inputs() @ weight).detach().requires_grad_() * 1
        before = value.square()
        with torch.no_grad():
            value.add_(1)
        (weight[:ROWS] * value).sum().backward()
        del before
        assert weight.grad is not None
        found, weight.grad = weight.grad, None
        return found

    expected = run()
    with make():
        assert torch.equal(run(), expected)


def test_recomputation_and_offload_go_together(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make()

    def run() -> Tensor:
        value = inputs().requires_grad_() * 1
        for layer in model.layers:
            value = checkpoint(lambda v, layer=layer: layer(v).tanh(), value, use_reentrant=False)
        return value.square().mean()

    expected = gradients(model, run())
    with offloader:
        total = run()
        offloader.drain()
        assert equal(gradients(model, total), expected)
    # The inputs of the parts, and what the loss saves; not what the parts compute again.
    assert offloader.last_step.sent_bytes == (len(model.layers) + 1) * BYTES


def test_graphs_can_be_used_again_and_differentiated_twice(make: Callable[..., Offloader]) -> None:
    def run(drain: Callable[[], None]) -> list[Tensor]:
        value = inputs().requires_grad_()
        total = (value * 2).sigmoid().exp().sum()
        drain()
        (first,) = torch.autograd.grad(total, value, create_graph=True)
        drain()
        (again,) = torch.autograd.grad(total, value, retain_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), value)
        return [first.detach(), again, second]

    expected = run(lambda: None)
    offloader = make()
    with offloader:
        assert equal(run(offloader.drain), expected)


def test_room_on_the_drive_is_used_again(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make(bounds=Bounds(1.0, 1.0))
    rooms = []
    for _ in range(5):
        steps(model, offloader, 1)
        rooms.append(offloader.last_step.room_bytes)
        offloader.drain()
        assert offloader._statistics().used_bytes == 0
    assert len(set(rooms)) == 1


def test_the_limit_is_kept(make: Callable[..., Offloader]) -> None:
    model = Stack()
    expected = gradients(model, model(inputs()))
    offloader = make(limit_bytes=3 * (BYTES + 4096))
    assert all(equal(found, expected) for found in steps(model, offloader))
    assert 0 < offloader.last_step.sent_bytes <= 3 * BYTES
    assert offloader.last_step.room_bytes <= 3 * (BYTES + 4096)
    assert offloader.last_step.fault == ""


def test_two_runs_share_a_folder_that_is_deleted(
    make: Callable[..., Offloader], tmp_path: Path
) -> None:
    model, folder = Stack(), tmp_path / "drive"
    expected = gradients(model, model(inputs()))
    folder.mkdir()
    one, other = make(folder), make(folder)
    with one, other:
        second = model(inputs())
        other.drain()
    with one:
        first = model(inputs())
        one.drain()
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)
    assert equal(gradients(model, first), expected)
    assert equal(gradients(model, second), expected)
    assert all(equal(found, expected) for found in steps(model, one))


@pytest.mark.mp
def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    script = """
import sys, torch, time
from holdfast.parallel.offload import Offloader
offloader = Offloader(sys.argv[1], smallest_bytes=1)
value = torch.randn(512, 512, requires_grad=True)
with offloader:
    total = (value * 2).exp().sum()
    offloader.drain()
print(offloader._statistics().used_bytes, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.*No such file"):
        Offloader(tmp_path / "missing")


def test_what_was_given_up_is_forgotten(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make()
    expected = gradients(model, model(inputs()))
    with offloader:
        lost = model(inputs())
        offloader.drain()
        assert offloader._statistics().used_bytes > 0
        offloader.cancel()
        assert offloader._statistics().used_bytes == 0
        with pytest.raises(OffloadError, match="given up"):
            lost.backward()
    assert all(equal(found, expected) for found in steps(model, offloader))


def test_a_closed_offloader_says_so(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make()
    with offloader:
        total = model(inputs())
        offloader.drain()
    offloader.close()
    with pytest.raises(OffloadError, match="close it after"):
        total.backward()


class Faulty:
    """An offloader whose drive is told to fail, and what it says of that."""

    def __init__(self, make: Callable[..., Offloader]) -> None:
        self.told: list[str] = []
        self.offloader = make(on_fault=self.told.append, bounds=Bounds(1.0, 1.0))

    def inject(self, operation: str, after: int, error: int, count: int = 1) -> None:
        assert self.offloader._room.file is not None
        self.offloader._room.file.engine.inject(operation, after, error, count)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails_keeps_the_tensor(
    make: Callable[..., Offloader], caplog: pytest.LogCaptureFixture, error: int
) -> None:
    model, faulty = Stack(), Faulty(make)
    expected = gradients(model, model(inputs()))
    faulty.inject("write", 3, error, 1000)
    with caplog.at_level(logging.WARNING, "holdfast.offload"):
        assert all(equal(found, expected) for found in steps(model, faulty.offloader))
    assert faulty.told == [f"activations stay in memory: the drive failed ({os.strerror(error)})"]
    assert len(caplog.records) == 1
    assert faulty.offloader.last_step.sent_bytes == 0
    faulty.offloader.drain()
    assert faulty.offloader._statistics().used_bytes == 0


def test_a_read_that_fails_once_is_repeated(make: Callable[..., Offloader]) -> None:
    model, faulty = Stack(), Faulty(make)
    expected = gradients(model, model(inputs()))
    faulty.inject("read", 2, errno.EIO)
    assert all(equal(found, expected) for found in steps(model, faulty.offloader))


def test_a_read_that_keeps_failing_is_an_error_and_no_gradient(
    make: Callable[..., Offloader],
) -> None:
    model, faulty = Stack(), Faulty(make)
    expected = gradients(model, model(inputs()))
    faulty.inject("read", 0, errno.EIO, 1000)
    with pytest.raises(OffloadError, match=r"cannot be read back.*use another one"):
        steps(model, faulty.offloader, 1)
    faulty.inject("read", 0, errno.EIO)
    faulty.offloader.cancel()
    assert all(equal(found, expected) for found in steps(model, faulty.offloader))


@pytest.mark.mp
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_full_drive_takes_what_it_can(make: Callable[..., Offloader], tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={4 * (BYTES + 4096)}", "none", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    told: list[str] = []
    model = Stack()
    expected = gradients(model, model(inputs()))
    try:
        offloader = make(mount, on_fault=told.append, bounds=Bounds(1.0, 1.0))
        assert all(equal(found, expected) for found in steps(model, offloader))
        assert 0 < offloader.last_step.sent_bytes < offloader.last_step.eligible_bytes
        assert len(told) == 1
        assert "full" in told[0]
        offloader.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_slow_drive_gets_less(make: Callable[..., Offloader]) -> None:
    model = Stack(12)
    expected = gradients(model, model(inputs()))
    offloader = make(bytes_per_s=1e6)
    sent = eligible = 0
    for _ in range(8):
        with offloader:
            found = gradients(model, model(inputs()))
        assert equal(found, expected)
        sent += offloader.last_step.sent_bytes
        eligible += offloader.last_step.eligible_bytes
    assert 0 < sent < eligible
    assert offloader.last_step.share < 1


def test_whatever_waits_for_the_drive_is_marked(
    make: Callable[..., Offloader], monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, marked = [0], dict[str, set[int]]()

    @contextmanager
    def waiting() -> Iterator[None]:
        depth[0] += 1
        yield
        depth[0] -= 1

    def watched(name: str, blocks: Callable[..., bool]) -> None:
        real = getattr(DiskFile, name)

        def call(file: DiskFile, *arguments: Any) -> Any:
            if blocks(file, *arguments):
                marked.setdefault(name, set()).add(depth[0])
            return real(file, *arguments)

        monkeypatch.setattr(DiskFile, name, call)

    watched("wait", lambda file, request: not file.done(request))
    for name in ("take", "write", "read"):  # they wait for room, and for a place in the queue
        watched(name, lambda *_: True)
    offloader = make(bounds=Bounds(1.0, 1.0), bytes_per_s=20.0 * BYTES, waiting=waiting)
    offloader.begin_step(["pass"])
    with offloader.forward("pass", at_once=False):
        loss = Stack()(torch.ones(ROWS, WIDTH))
    offloader.drain()
    offloader.backward("pass")
    loss.backward()
    assert marked == {"wait": {1}, "take": {1}, "write": {1}, "read": {1}}
    assert depth == [0]


@pytest.mark.parametrize("end", ["drain", "cancel"])
def test_the_end_of_transfers_is_a_marked_wait(make: Callable[..., Offloader], end: str) -> None:
    began: list[float] = []
    took: list[float] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        began.append(perf_counter())
        yield
        took.append(perf_counter() - began[-1])

    offloader = make(bounds=Bounds(1.0, 1.0), bytes_per_s=20.0 * BYTES, waiting=waiting)
    offloader.begin_step()
    with offloader.forward("pass", at_once=False):
        Stack()(torch.ones(ROWS, WIDTH))
    start = perf_counter()
    getattr(offloader, end)()
    assert took[-1] > 0.9 * (perf_counter() - start) > 0.05
