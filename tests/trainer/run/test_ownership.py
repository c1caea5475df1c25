"""Whose a run's folder, checkpoints and copies in memory are: nothing of another run is taken."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.checkpoint.stores.local import LocalStore
from holdfast.launch.launchers.cluster import join_run
from holdfast.launch.launchers.join_file import JoinInfo
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.trainer.run import RunDirectory, RunRequest, claim, memory_copies, opened_run
from holdfast.trainer.run.claim import CheckpointOwner
from holdfast.trainer.run.identity import IDENTITY, read_identity
from holdfast.trainer.run.memory_copies import forget_newer, memory_root
from holdfast.trainer.run.resume import find_resume
from support.runs.kept_runs import open_and_end, save_as_run
from support.runs.small_runs import make_config

NOBODY = 65534


def _request(folder: Path, name: str = "run", **checkpoint: Any) -> RunRequest:
    train = checkpoint.pop("train", {})
    config = make_config(train=train, checkpoint=checkpoint)
    return RunRequest(folder / "name.toml", config, out=folder / name)


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for copies of its own, where all users may write as in /dev/shm."""
    place = tmp_path / "shm"
    place.mkdir()
    place.chmod(0o1777)
    monkeypatch.setattr(memory_copies, "SHARED_MEMORY", place)
    return place


def test_a_run_has_an_identity_that_only_its_user_can_read(tmp_path: Path) -> None:
    request = _request(tmp_path)
    open_and_end(request)
    first = read_identity(tmp_path / "run")
    assert (tmp_path / "run" / IDENTITY).stat().st_mode & 0o777 == 0o600
    open_and_end(request)
    assert read_identity(tmp_path / "run") == first


def test_a_moved_run_is_the_same_and_a_copy_beside_it_is_another(tmp_path: Path) -> None:
    open_and_end(_request(tmp_path, "a"))
    first = read_identity(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    open_and_end(_request(tmp_path, "b"))
    moved = read_identity(tmp_path / "b")
    assert first is not None
    assert moved is not None
    assert (moved.id, moved.path) == (first.id, str(tmp_path / "b"))
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    [note] = open_and_end(_request(tmp_path, "c"))
    assert "is a copy of" in note
    copied = read_identity(tmp_path / "c")
    assert copied is not None
    assert copied.id != first.id
    assert memory_root(tmp_path / "b") != memory_root(tmp_path / "c")


def test_a_run_that_is_named_by_a_link_is_no_copy_of_itself(tmp_path: Path) -> None:
    open_and_end(_request(tmp_path, "a"))
    first = read_identity(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert open_and_end(_request(tmp_path, "link")) == ()
    linked = read_identity(tmp_path / "a")
    assert first is not None
    assert linked is not None
    assert (linked.id, linked.secret) == (first.id, first.secret)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to make files of another user")
def test_a_folder_of_another_user_is_no_run_of_ours(tmp_path: Path) -> None:
    request = _request(tmp_path)
    open_and_end(request)
    os.chown(tmp_path / "run" / IDENTITY, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
        open_and_end(request)
    (tmp_path / "run" / IDENTITY).unlink()
    os.chown(tmp_path / "run", NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
        open_and_end(request)
    (tmp_path / "empty").mkdir()
    os.chown(tmp_path / "empty", NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
        open_and_end(_request(tmp_path, "empty"))


@pytest.mark.parametrize("name", [IDENTITY, ".lock"])
def test_links_that_lie_in_a_runs_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    request = _request(tmp_path)
    open_and_end(request)
    (tmp_path / "run" / name).rename(tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=name):
        open_and_end(request)
    assert (tmp_path / "precious").read_bytes() == before


# Copies in memory.


def test_copies_in_memory_are_found_again_by_their_run_alone(
    tmp_path: Path, shared_memory: Path
) -> None:
    request = _request(tmp_path, memory_every=1)
    open_and_end(request)
    root = tmp_path / "run"
    place = memory_root(root)
    assert place is not None
    assert place.stat().st_mode & 0o777 == 0o700
    save_as_run(place, request.config, 3)
    assert find_resume(root, request.config, "auto").candidates
    shutil.copytree(root, tmp_path / "copy")
    open_and_end(_request(tmp_path, "copy", memory_every=1))
    assert memory_root(tmp_path / "copy") != place
    assert not find_resume(tmp_path / "copy", request.config, "auto").candidates
    shutil.rmtree(root)
    open_and_end(request)  # the folder is made anew
    assert memory_root(root) != place
    assert not find_resume(root, request.config, "auto").candidates


def test_copies_of_steps_that_a_run_repeats_are_removed_and_no_others(
    tmp_path: Path, shared_memory: Path
) -> None:
    places = []
    for name in ("run", "other"):
        request = _request(tmp_path, name, memory_every=1)
        open_and_end(request)
        place = memory_root(tmp_path / name)
        assert place is not None
        save_as_run(place, request.config, 2, 3, 4)
        places.append(place)
    names = [f"step-{step:08}" for step in (2, 3, 4)]
    assert sorted(forget_newer(tmp_path / "run", 2)) == names[1:]
    assert list(LocalStore(places[0]).names()) == names[:1]
    assert (places[0] / "owner.json").exists()
    assert list(LocalStore(places[1]).names()) == names
    assert forget_newer(tmp_path / "run", 2) == []
    assert forget_newer(tmp_path / "no-run", 0) == []
    # With nothing to go on from, a run repeats every step.
    assert forget_newer(tmp_path / "run", 0) == names[:1]


def test_copies_of_runs_that_are_gone_are_swept_and_no_others(
    tmp_path: Path, shared_memory: Path
) -> None:
    places: dict[str, Path] = {}
    for name in ("here", "gone", "unmounted"):
        request = _request(tmp_path, name, memory_every=1)
        open_and_end(request)
        place = memory_root(tmp_path / name)
        assert place is not None
        save_as_run(place, request.config, 3)
        places[name] = place
    stranger = shared_memory / f"holdfast-{os.getuid()}-made-by-hand"
    stranger.mkdir(mode=0o700)
    owner = places["unmounted"] / "owner.json"
    owner.write_bytes(owner.read_bytes().replace(b'"device":', b'"device":9'))
    for name in ("gone", "unmounted"):
        shutil.rmtree(tmp_path / name)
    [note] = open_and_end(_request(tmp_path, "another"))
    assert str(tmp_path / "gone") in note
    assert sorted(shared_memory.iterdir()) == sorted(
        [places["here"], places["unmounted"], stranger]
    )


def test_a_folder_for_copies_that_was_never_used_is_swept_and_made_again(
    tmp_path: Path, shared_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = shared_memory / f"holdfast-{os.getuid()}-{'0' * 16}"
    empty.mkdir(mode=0o700)
    swept: list[Path] = []
    lock = memory_copies.try_lock

    def late(descriptor: int) -> bool | None:
        """The lock of a folder that another process's sweep removes at the last moment."""
        if not swept:
            swept.extend(path for path in shared_memory.iterdir() if path != empty)
            memory_copies.sweep_memory()
        return lock(descriptor)

    monkeypatch.setattr(memory_copies, "try_lock", late)
    with opened_run(_request(tmp_path, memory_every=1)):
        assert not empty.exists()
        assert [(path / "owner.json").exists() for path in shared_memory.iterdir()] == [True]
        assert list(shared_memory.iterdir()) == swept


def test_copies_that_another_process_holds_are_not_touched(
    tmp_path: Path, shared_memory: Path
) -> None:
    request = _request(tmp_path, memory_every=1)
    with opened_run(request):
        place = memory_root(tmp_path / "run")
        assert place is not None
        shutil.rmtree(tmp_path / "run")
        assert open_and_end(_request(tmp_path, "another")) == ()
        assert place.is_dir()
    assert len(open_and_end(_request(tmp_path, "another"))) == 1
    assert not place.exists()


def test_copies_in_memory_are_refused_where_the_ranks_are_on_several_machines(
    tmp_path: Path, shared_memory: Path
) -> None:
    request = _request(tmp_path, memory_every=1)
    parallel = make_config(parallel={"data": 2}).parallel
    config = msgspec.structs.replace(request.config, parallel=parallel)
    request = replace(request, config=config, ranks_here=1)
    with pytest.raises(ConfigError, match=r"this one has 1 of 2 ranks; set it to 0"):
        open_and_end(request)
    assert not (tmp_path / "run").exists()
    info = JoinInfo("http://127.0.0.1:9", "token", 2, 2, machine="another")
    with pytest.raises(ConfigError, match=r"memory of its machine, and this is another one"):
        join_run(RunDirectory(tmp_path), request.config, info, (2,))
    assert not list(shared_memory.iterdir())


def test_a_store_that_cannot_be_reached_ends_a_run_that_begins_and_is_told_to_one_that_goes_on(
    tmp_path: Path,
) -> None:
    request = _request(tmp_path, path="http://127.0.0.1:9/checkpoints")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9/checkpoints cannot be used: .*Conn"):
        open_and_end(request, resume="none")
    save_as_run(tmp_path / "run" / "checkpoints", request.config, 3)
    assert any("cannot be asked now" in note for note in open_and_end(request))


def _poison(place: Path, how: str) -> None:
    if how == "link":
        (place.parent / "theirs").mkdir()
        place.symlink_to(place.parent / "theirs")
    elif how == "file":
        place.write_text("")
    elif how == "open to others":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.mkdir()
        os.chown(place, NOBODY, NOBODY)


@pytest.mark.parametrize("how", ["link", "file", "open to others", "another user"])
def test_what_others_put_in_the_place_of_copies_in_memory_is_refused(
    tmp_path: Path, shared_memory: Path, how: str
) -> None:
    if how == "another user" and os.geteuid() != 0:
        pytest.skip("takes root, to make files of another user")
    request = _request(tmp_path, memory_every=1)
    open_and_end(request)
    place = memory_root(tmp_path / "run")
    assert place is not None
    shutil.rmtree(place)
    _poison(place, how)
    with pytest.raises(ConfigError, match="cannot be taken for this run's copies in memory"):
        open_and_end(request)
    with pytest.raises(ConfigError, match="cannot be taken for this run's copies in memory"):
        memory_root(tmp_path / "run")


# One place of checkpoints, two runs.

PLACES = ["{}/shared", "file://{}/shared"]


@pytest.mark.parametrize("form", PLACES)
def test_two_runs_do_not_use_one_place_of_checkpoints_at_a_time(tmp_path: Path, form: str) -> None:
    path = form.format(tmp_path)
    with opened_run(_request(tmp_path, "a", path=path)):
        with pytest.raises(ConfigError) as refused:
            open_and_end(_request(tmp_path, "b", path=path))
        assert str(tmp_path / "a") in str(refused.value)
        assert path in str(refused.value)
        assert not (tmp_path / "b").exists()
    assert open_and_end(_request(tmp_path, "b", path=path)) == ()


@pytest.mark.parametrize("form", PLACES)
def test_one_after_the_other_is_told_or_refused(tmp_path: Path, form: str) -> None:
    path = form.format(tmp_path)
    first = _request(tmp_path, "a", path=path)
    open_and_end(first)
    save_as_run(tmp_path / "shared", first.config, 3)
    assert open_and_end(first) == ()
    other = _request(tmp_path, "b", path=path, train={"seed": 5})
    with pytest.raises(ConfigError, match=f"belongs to the run {tmp_path}/a"):
        open_and_end(other)
    with pytest.raises(ConfigError, match=f"belongs to the run {tmp_path}/a"):
        open_and_end(_request(tmp_path, "b", path=path), resume="none")
    [told] = open_and_end(_request(tmp_path, "c", path=path))
    assert f"belonged to the run {tmp_path}/a" in told
    with pytest.raises(ConfigError, match=f"belongs to the run {tmp_path}/c"):
        open_and_end(other)
    named = open_and_end(
        replace(other, allow_change=("train.seed",)), resume=f"{path}/step-00000003"
    )
    assert f"belonged to the run {tmp_path}/c" in named[0]
    assert LocalStore(tmp_path / "shared").names() == ["step-00000003"]


@pytest.mark.parametrize("host", ["far.example", socket.gethostname()])
def test_a_run_on_another_machine_that_did_not_end_keeps_its_url(tmp_path: Path, host: str) -> None:
    url = f"file://{tmp_path}/shared"
    request = _request(tmp_path, path=url)
    (tmp_path / "shared").mkdir()
    owner = CheckpointOwner("0" * 32, "/far/run", host, in_use=True, machine="another")
    (tmp_path / "shared" / "owner.json").write_bytes(msgspec.json.encode(owner))
    save_as_run(tmp_path / "shared", request.config, 3)
    with pytest.raises(ConfigError, match=f"/far/run on {host}, which has not ended"):
        open_and_end(request)
    assert len(open_and_end(request, resume=url)) == 1


def test_checkpoints_without_an_owner_are_taken_over_aloud(tmp_path: Path) -> None:
    request = _request(tmp_path, path=str(tmp_path / "shared"))
    save_as_run(tmp_path / "shared", request.config, 3)
    [told] = open_and_end(request)
    assert "checkpoints that name no run" in told
    assert open_and_end(request) == ()


def test_checkpoints_in_another_runs_folder_are_not_taken(tmp_path: Path) -> None:
    open_and_end(_request(tmp_path, "a"))
    for path in ("a/checkpoints", "a"):
        with pytest.raises(ConfigError, match=f"in the folder of the run {tmp_path}/a"):
            open_and_end(_request(tmp_path, "b", path=str(tmp_path / path)))


@pytest.mark.mp
def test_the_lock_lasts_as_long_as_any_process_of_the_run(tmp_path: Path) -> None:
    """A command that is killed with SIGKILL leaves the lock to its forked workers, if any live."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from holdfast.trainer.run.folder_lock import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), '--out'):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.close(1)\n"
        "        time.sleep(60)\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdout=subprocess.PIPE, timeout=60, check=False,
    )  # fmt: skip
    child = int(done.stdout)
    try:
        with pytest.raises(ConfigError, match="in use by another run"):
            open_and_end(_request(tmp_path))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_lies_in_the_place_of_latest_is_named_before_a_step(tmp_path: Path, make: Any) -> None:
    """Every save would fail to write it, at the end of a training."""
    open_and_end(_request(tmp_path))
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(exist_ok=True)
    make(folder / "latest")
    with pytest.raises(CheckpointError, match="latest cannot be read: it is a"):
        open_and_end(_request(tmp_path))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_checkpoints_that_may_not_be_written_are_refused_before_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    request = _request(tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    save_as_run(folder, request.config, 1)
    make = claim.tempfile.TemporaryFile

    def refused(dir: Path | None = None) -> Any:
        if dir == folder:
            raise OSError(number, os.strerror(number), str(dir))
        return make(dir=dir)

    monkeypatch.setattr(claim.tempfile, "TemporaryFile", refused)
    full = number == errno.ENOSPC  # room may come
    with contextlib.nullcontext() if full else pytest.raises(ConfigError, match="make it writable"):
        open_and_end(request)
