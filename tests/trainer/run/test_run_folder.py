"""The folder that a run is given: nothing of a person's is overwritten, and a run that can go on
is gone on with."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.run import RunRequest, opened_run
from holdfast.trainer.run.folder_lock import LOCK
from holdfast.trainer.run.identity import IDENTITY
from holdfast.trainer.run.run_directory import RUNS
from holdfast.trainer.run.run_folder import check_run_folder, choose_root, locked_run
from support.runs.small_runs import make_config

CONFIG = Path("name.toml")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(root: Path) -> None:
    """Open a run there and end it before its first step."""
    with opened_run(RunRequest(CONFIG, make_config(), out=root)):
        pass


def chosen(*, resume: str = "auto") -> Path:
    return choose_root(CONFIG, None, make_config(), resume)


def test_a_named_folder_is_taken_as_it_is(folder: Path) -> None:
    assert choose_root(CONFIG, folder / "mine", make_config()) == folder / "mine"


def test_numbers_go_up_and_a_run_without_a_step_is_used_again(folder: Path) -> None:
    assert chosen() == RUNS / "name-1"
    begin(RUNS / "name-1")
    (RUNS / "name-other").mkdir()
    assert chosen() == RUNS / "name-1"
    (RUNS / "name-1/metrics.jsonl").write_text('{"step": 1, "loss_hex": "0x1p+0"}\n')
    begin(RUNS / "name-3")
    assert chosen() == RUNS / "name-3"


def test_a_finished_run_is_not_gone_on_with(folder: Path) -> None:
    begin(RUNS / "name-1")
    (RUNS / "name-1/events.jsonl").write_text('{"event": "run_finished", "time": 1.0}\n')
    assert chosen() == RUNS / "name-2"


def test_a_folder_in_use_is_passed_over(folder: Path) -> None:
    begin(RUNS / "name-1")
    with locked_run(RUNS / "name-1"):
        assert chosen() == RUNS / "name-2"
    assert chosen() == RUNS / "name-1"


def test_a_folder_of_a_persons_files_is_refused_and_stays_as_it_is(folder: Path) -> None:
    mine = folder / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex; name a new folder"):
        begin(mine)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError):
        check_run_folder(mine / "thesis.tex")


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "superseded-step-00000003"])
def test_parts_of_a_run_may_be_copied_into_a_new_folder(folder: Path, name: str) -> None:
    (folder / "run" / name).mkdir(parents=True)
    check_run_folder(folder / "run")
    (folder / "run" / f"{name}-mine").touch()
    if not name.startswith("superseded-"):
        with pytest.raises(ConfigError, match="is not the folder of a run"):
            check_run_folder(folder / "run")


def test_a_start_that_fails_leaves_no_folder_and_takes_none_away(folder: Path) -> None:
    class Refused(Exception):
        pass

    def fail(root: Path, *files: str) -> None:
        with contextlib.suppress(Refused), locked_run(root):
            assert (root / LOCK).exists()
            for name in files:
                (root / name).touch()
            raise Refused

    fail(folder / "a/b/run")
    assert list(folder.iterdir()) == []
    (folder / "there").mkdir()
    fail(folder / "there")
    assert (folder / "there").is_dir()
    fail(folder / "new", "config.toml")
    assert (folder / "new/config.toml").exists(), "a run had begun there"


def test_what_a_killed_run_left_goes_and_its_records_stay(folder: Path) -> None:
    root = folder / "run"
    begin(root)
    left = ["logs/rank-0.error.json", "logs/x.partial", "config.toml.partial", f".{IDENTITY}-abc"]
    kept = ["logs/rank-0.log", "latest-notes.txt"]
    for name in (*left, *kept):
        (root / name).touch()
    (root / "mine.partial").mkdir()
    begin(root)
    assert not any((root / name).exists() for name in left)
    assert all((root / name).exists() for name in (*kept, "mine.partial"))
