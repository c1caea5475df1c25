"""The join file: two that join at once get other ranks, and none waits for ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.launch.launchers import join_file
from holdfast.launch.launchers.join_file import JoinInfo, published_join_file, take_ranks
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import open_lock, try_lock
from holdfast.trainer.run import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """An elastic run under way, of four ranks."""
    run = RunDirectory(tmp_path)
    with socket.socket() as lighthouse, published_join_file(run) as announce:
        lighthouse.bind(("127.0.0.1", 0))
        lighthouse.listen()
        announce(JoinInfo(f"http://127.0.0.1:{lighthouse.getsockname()[1]}", "token", 4, 4))
        yield run


def test_nothing_is_left_in_a_folder_that_is_not_a_run_s(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="other is not an elastic run that is under way"):
        take_ranks(RunDirectory(tmp_path / "other"), 1)
    assert not list((tmp_path / "other").iterdir())
    with pytest.raises(ConfigError, match="none does not exist; name the folder of a run"):
        take_ranks(RunDirectory(tmp_path / "none"), 1)


def test_no_rank_is_given_out_twice(run: RunDirectory) -> None:
    assert take_ranks(run, 2)[1] == (4, 5)
    assert take_ranks(run, 1)[1] == (6,)


def test_a_process_that_joins_for_ever_is_not_waited_for(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_file, "_LOCK_S", 0.2)
    descriptor = open_lock(run.root / ".join-lock")
    assert try_lock(descriptor)
    with pytest.raises(ConfigError, match=r"\.join-lock has been locked for 0\.2 s by another"):
        take_ranks(run, 1)
    os.close(descriptor)
    assert take_ranks(run, 1)[1] == (4,)


def test_a_link_in_the_place_of_the_lock_is_not_followed(run: RunDirectory, tmp_path: Path) -> None:
    (run.root / ".join-lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"\.join-lock cannot be written: it is a link"):
        take_ranks(run, 1)
    assert not (tmp_path / "elsewhere").exists()
