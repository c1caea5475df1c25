"""Scratch folders: what ended processes left goes at the next start, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import scratch
from holdfast.parallel.files.scratch import PREFIX, scratch_folder, sweep_scratch


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "tmp"
    place.mkdir()
    return place


def _left(place: Path, *, mark: bytes | None = None) -> Path:
    """A scratch folder as a killed process leaves it."""
    elsewhere = place.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    with scratch_folder(elsewhere) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("content")
        left = Path(shutil.copytree(folder, place / folder.name))
    if mark is not None:
        (left / ".holdfast-mark").write_bytes(mark)
    return left


def test_a_place_without_room_is_named_before_anything_is_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(place))
    monkeypatch.setattr(scratch, "_LEAST_ROOM", 1 << 62)
    with pytest.raises(ConfigError, match="MiB of room; set TMPDIR"), scratch_folder():
        pass
    assert list(place.iterdir()) == []


def test_a_folder_is_private_and_goes_at_the_end_of_its_block(place: Path) -> None:
    with scratch_folder(place) as folder:
        assert folder.parent == place
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "deep").mkdir()
        (folder / "deep" / "link").symlink_to(place)
    assert not list(place.iterdir())


def test_the_next_start_removes_what_a_killed_process_left(place: Path) -> None:
    left = _left(place)
    with scratch_folder(place) as folder:
        assert not left.exists()
        assert list(place.iterdir()) == [folder]


def test_a_folder_in_use_stays(place: Path) -> None:
    with scratch_folder(place) as folder:
        assert sweep_scratch(place) == []
        assert folder.is_dir()


@pytest.mark.parametrize("kind", ["unmarked", "open to others", "a link", "a file", "another name"])
def test_nothing_that_cannot_be_identified_is_removed(place: Path, kind: str) -> None:
    kept = place / f"{PREFIX}abcdefgh"
    match kind:
        case "unmarked":
            kept.mkdir(mode=0o700)
            (kept / "thesis.tex").write_text("")
        case "open to others":
            kept = _left(place)
            kept.chmod(0o770)
        case "a link":
            kept.symlink_to(_left(place).rename(place / "elsewhere"))
        case "a file":
            kept.write_text("")
        case _:
            kept = _left(place).rename(place / "results")
    before = sorted(place.rglob("*"))
    assert sweep_scratch(place) == []
    assert sorted(place.rglob("*")) == before


def test_a_mark_that_is_a_link_is_not_followed(place: Path) -> None:
    left, other = _left(place), place / "other"
    (left / ".holdfast-mark").rename(other)
    (left / ".holdfast-mark").symlink_to(other)
    assert sweep_scratch(place) == []
    assert (left / "deep" / "file").exists()


def test_a_link_in_a_folder_goes_and_its_target_stays(place: Path) -> None:
    target = place / "target"
    target.mkdir()
    (target / "file").write_text("")
    left = _left(place)
    (left / "deep" / "link").symlink_to(target)
    (left / "link").symlink_to(target)
    assert sweep_scratch(place) == [left]
    assert (target / "file").exists()


def test_another_users_folder_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = _left(place)
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    assert sweep_scratch(place) == []
    assert left.exists()


def test_a_folder_of_another_machine_stays_and_one_from_before_a_reboot_goes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.parent / "machine-id").write_text("0123\n")
    monkeypatch.setattr(scratch, "_INSTALLATION", place.parent / "machine-id")
    here = {"host": os.uname().nodename, "installation": "0123"}
    other, of_our_name, damaged = (
        _left(place, mark=mark)
        for mark in (
            json.dumps({"boot": "other", "host": "of-another"}).encode(),
            json.dumps({**here, "boot": "other", "installation": "4567"}).encode(),
            b"\xff[",
        )
    )
    before = _left(place, mark=json.dumps({**here, "boot": "earlier"}).encode())
    assert sweep_scratch(place) == [before]
    assert other.exists()
    assert of_our_name.exists()
    assert damaged.exists()


def test_what_a_process_left_before_its_first_use_goes(place: Path) -> None:
    empty, unwritten = place / f"{PREFIX}empty", place / f"{PREFIX}unwritten"
    for folder in (empty, unwritten):
        folder.mkdir(mode=0o700)
    (unwritten / ".holdfast-mark").touch()
    assert set(sweep_scratch(place)) == {empty, unwritten}


@pytest.mark.parametrize("moment", ["made", "opened", "locked"])
def test_a_process_whose_new_folder_is_swept_makes_another(
    place: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    swept: list[Path] = []
    real = {"made": os.open, "opened": scratch.try_lock, "locked": scratch.boot}[moment]

    def late(*arguments: object, **options: object) -> object:
        monkeypatch.undo()
        folder = next(p for p in place.iterdir() if p.name.startswith(PREFIX))
        if moment == "locked":  # as where the two processes do not see each other's locks
            scratch._remove(folder)
            swept.append(folder)
        else:
            swept.extend(sweep_scratch(place))
        return real(*arguments, **options)  # type: ignore[operator]

    name = {"made": "open", "opened": "try_lock", "locked": "boot"}[moment]
    monkeypatch.setattr(os if moment == "made" else scratch, name, late)
    with scratch_folder(place) as folder:
        assert len(swept) == 1
        assert folder.is_dir()
        assert folder not in swept
    assert not list(place.iterdir())


def test_without_locks_folders_are_made_and_none_is_swept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = _left(place)
    monkeypatch.setattr(scratch, "try_lock", lambda _: None)
    with scratch_folder(place) as folder:
        assert folder.is_dir()
        assert left.is_dir()


def test_threads_that_make_and_sweep_at_once_lose_nothing(place: Path) -> None:
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                with scratch_folder(place) as folder:
                    (folder / "file").write_text("content")
                    sweep_scratch(place)
                    assert (folder / "file").read_text() == "content"
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert not list(place.iterdir())


_PROGRAM = """
import os, sys, time
from pathlib import Path
from holdfast.parallel.files import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    child = os.fork()
    if child:
        print(child, folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(place: Path) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    command = [sys.executable, "-c", _PROGRAM, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child, folder = process.stdout.readline().split()
        yield process, int(child), Path(folder)
        process.kill()


@pytest.mark.mp
def test_a_folder_stays_until_all_processes_of_its_owner_are_killed(
    place: Path, owner: tuple[subprocess.Popen[str], int, Path]
) -> None:
    process, child, folder = owner
    assert sweep_scratch(place) == []
    process.kill()
    process.wait()
    assert sweep_scratch(place) == []
    pidfd = os.pidfd_open(child)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    # The write end of the pipe is closed once both have ended.
    assert process.stdout is not None
    process.stdout.read()
    assert sweep_scratch(place) == [folder]
    assert not list(place.iterdir())
