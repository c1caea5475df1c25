"""Disks that misbehave: a file system in a file that stalls and fills, and syncs that are slow."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

STALL = """fsfreeze --freeze "$0" && echo stalled
timeout "$1" head --lines 1 > /dev/null
fsfreeze --unfreeze "$0"
"""
"""Stalls the disk at a folder until a line is read, the input ends, or a number of seconds has
passed: the test may be killed or wait for that disk itself, and what is stalled then stays so.
"""
STALL_S = 60
SLOW_SYNC = Path(__file__).with_name("slow_sync.c")


@dataclass(slots=True)
class Disk:
    """A mounted file system of its own."""

    folder: Path
    """Where it is mounted."""
    _stall: subprocess.Popen[str] | None = field(default=None, init=False)

    def stall(self) -> None:
        """Let every write, sync and change of a name wait, until `go_on`, the end of this process,
        or STALL_S.
        """
        self._stall = subprocess.Popen(
            ["sh", "-c", STALL, str(self.folder), str(STALL_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._stall.stdout is not None
        assert self._stall.stdout.readline() == "stalled\n"

    def go_on(self) -> None:
        """Let what waits go on; nothing if it does."""
        if self._stall is not None:
            self._stall.communicate("go on\n")
            assert self._stall.returncode == 0, f"{self.folder} cannot go on"
            self._stall = None

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
