"""Locks of files: one process has each, no name leads elsewhere, and no wait is without an end."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from holdfast.parallel.files.locks import await_lock, is_at, open_lock, try_lock


def test_one_opening_has_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = open_lock(path), open_lock(path)
    assert try_lock(first) is True
    assert try_lock(second) is False
    os.close(first)
    assert try_lock(second) is True
    os.close(second)


def test_a_disk_without_locks_is_told_from_one_that_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    descriptor = open_lock(tmp_path / "lock")
    assert try_lock(descriptor) is None
    assert await_lock(descriptor, lambda: 0.0)
    os.close(descriptor)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / "lock", tmp_path / "elsewhere"
    match kind:
        case "link":
            path.symlink_to(elsewhere)
        case "pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with pytest.raises(OSError, match=r"link|a pipe|directory"):
        open_lock(path)
    assert not elsewhere.exists()


def test_no_other_user_can_have_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch(0o644)  # as an earlier version made it
    os.close(open_lock(path))
    assert path.stat().st_mode & 0o777 == 0o600
    if os.geteuid() != 0:
        return  # only root makes files of another user
    os.chown(path, os.getuid() + 1, -1)
    with pytest.raises(PermissionError, match=f"belongs to user {os.getuid() + 1}"):
        open_lock(path)


def test_a_wait_ends_when_the_lock_is_free_and_when_the_time_is_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = open_lock(path), open_lock(path)
    assert try_lock(first)
    left_s = iter([1.0, 1.0, 0.0])
    assert not await_lock(second, lambda: next(left_s))
    threading.Timer(0.1, os.close, [first]).start()
    assert await_lock(second, lambda: 60.0)
    os.close(second)


def test_a_file_that_was_removed_or_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    descriptor = open_lock(path)
    assert is_at(descriptor, path)
    path.unlink()
    assert not is_at(descriptor, path)
    os.close(open_lock(path))
    assert not is_at(descriptor, path)
    os.close(descriptor)
