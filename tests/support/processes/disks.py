"""Disks that misbehave: a file system in a file that stalls and fills, and syncs that are slow."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

FREEZE, THAW = 0xC0045877, 0xC0045878
"""FIFREEZE and FITHAW of linux/fs.h."""
SLOW_SYNC = Path(__file__).with_name("slow_sync.c")


@dataclass(frozen=True, slots=True)
class Disk:
    """A mounted file system of its own."""

    folder: Path
    """Where it is mounted."""

    def stall(self) -> None:
        """Let every write, sync and change of a name wait, until `go_on`."""
        self._control(FREEZE)

    def go_on(self) -> None:
        """Let what waits go on; nothing if it does."""
        try:
            self._control(THAW)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def fill(self) -> None:
        """Take all the room that is left, until `free`."""
        descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT)
        try:
            size = 1 << 20
            while size >= 512:
                try:
                    os.write(descriptor, bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

    def _control(self, request: int) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, request, 0)
        finally:
            os.close(descriptor)


@contextmanager
def disk(folder: Path, size_mib: int) -> Iterator[Disk]:
    """A disk at a folder, until the block ends; the test is skipped where none can be mounted.

    Raises:
        CalledProcessError: a process still uses it at the end.
    """
    image = folder.with_name(f"{folder.name}.image")
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    try:
        _run("mkfs.ext4", "-q", "-m", "0", str(image))
        _run("mount", "-o", "loop", str(image), str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"no file system can be mounted (root and loop devices are needed): {reason}")
    made = Disk(folder)
    try:
        yield made
    finally:
        made.go_on()
        _run("umount", str(folder))
        image.unlink()


def slow_sync_library(folder: Path) -> Path:
    """A library for LD_PRELOAD by which every sync below HOLDFAST_TEST_SLOW_BELOW takes as many
    milliseconds more as the file HOLDFAST_TEST_SLOW_MS says; the test is skipped without a
    compiler.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: cc")
    made = folder / "slow_sync.so"
    _run(compiler, "-O1", "-shared", "-fPIC", "-o", str(made), str(SLOW_SYNC), "-ldl")
    return made


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, text=True)
