"""All processes of a run find one secret by themselves, and no other user can read it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.links import new_secret
from holdfast.parallel.links.secret import SECRET_VARIABLE
from holdfast.trainer.run import RunRequest, identity, opened_run
from holdfast.trainer.run.identity import IDENTITY, read_identity
from holdfast.trainer.run.secret import job_secret, run_secret
from support.runs.small_runs import make_config


def test_tasks_that_start_at_once_find_one_secret_which_the_run_then_has(tmp_path: Path) -> None:
    root = tmp_path / "new" / "run"
    with ThreadPoolExecutor(16) as tasks:
        found = {tasks.submit(job_secret, {}, root) for _ in range(64)}
        [secret] = {one.result() for one in found}
    assert (root / IDENTITY).stat().st_mode & 0o777 == 0o600
    with opened_run(RunRequest(tmp_path / "name.toml", make_config(), out=root)) as opened:
        assert run_secret({}, opened.directory.root) == secret == job_secret({}, root)


def test_a_disk_without_hard_links_keeps_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(identity.os, "link", refused)
    assert job_secret({}, tmp_path / "run") == run_secret({}, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [IDENTITY]


def test_tasks_of_a_job_without_a_named_folder_have_one_below_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = job_secret({}, None)
    assert secret == job_secret({}, None)
    with opened_run(RunRequest(tmp_path / "name.toml", make_config())) as opened:
        root = opened.directory.root
        assert root == Path("runs/name-1")
        assert run_secret({}, root) != secret, "it is the run's own, which `holdfast join` finds"


def test_a_given_secret_is_used_instead_and_no_file_is_made(tmp_path: Path) -> None:
    given = {SECRET_VARIABLE: new_secret()}
    assert job_secret(given, tmp_path / "run") == given[SECRET_VARIABLE]
    assert run_secret(given, tmp_path / "run") == given[SECRET_VARIABLE]
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="has 3 characters; give it at least 16, at random: "):
        job_secret({SECRET_VARIABLE: "abc"}, tmp_path / "run")


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    job_secret({}, tmp_path)
    (tmp_path / IDENTITY).chmod(0o640)
    for found in (job_secret, run_secret):
        with pytest.raises(ConfigError, match=r"others may read .* \(mode 640\); remove it"):
            found({}, tmp_path)


def test_no_secret_is_put_into_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        job_secret({}, tmp_path)
    with pytest.raises(ConfigError, match="has the run's secret: No such file"):
        run_secret({}, tmp_path)
    assert read_identity(tmp_path) is None


def test_a_task_that_cannot_make_one_says_how_to_give_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="export HOLDFAST_SECRET="):
        job_secret({}, None)
