"""What drives do: they fail, are full, are slow, are waited for. No gradient is wrong by that."""

from __future__ import annotations

import errno
import logging
import os
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

from holdfast.parallel.errors import OffloadError
from holdfast.parallel.offload import Bounds, Offloader
from holdfast.parallel.offload.stores.disk_file import DiskFile
from support.runs.offloaded import BYTES, ROWS, WIDTH, Stack, equal, gradients, inputs, steps


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
    assert took[-1] > 0.5 * (perf_counter() - start) > 0.02
