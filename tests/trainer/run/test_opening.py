"""The opening of a run: what is checked before the folder is touched, and what is left out."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files.scratch import PREFIX
from holdfast.trainer.config import dump_toml
from holdfast.trainer.run import RunRequest, opened_run, opening
from holdfast.trainer.run.throughput import Throughput, with_throughput
from support.runs.small_runs import make_config


@pytest.fixture
def request_(tmp_path: Path) -> RunRequest:
    return RunRequest(tmp_path / "name.toml", make_config(), out=tmp_path / "run", world_size=1)


def test_a_wrong_number_of_workers_is_told_before_a_folder_is_made(request_: RunRequest) -> None:
    with pytest.raises(ConfigError, match="3"), opened_run(replace(request_, world_size=3)):
        pass
    assert request_.out is not None
    assert not request_.out.exists()


def test_a_checkpoint_of_another_format_is_answered_by_the_command_that_converts_it(
    request_: RunRequest, tmp_path: Path
) -> None:
    (tmp_path / "Llama 3").mkdir()
    (tmp_path / "Llama 3/model.safetensors").touch()
    other = replace(request_, resume=str(tmp_path / "Llama 3"))
    command = f"`holdfast convert '{other.resume}' 'Llama 3-start' --to holdfast`"
    with pytest.raises(ConfigError, match=re.escape(command)), opened_run(other):
        pass
    with (
        pytest.raises(ConfigError, match="is not a checkpoint"),
        opened_run(replace(request_, resume=str(tmp_path))),
    ):
        pass


def test_a_url_is_no_folder_of_a_run(
    request_: RunRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = replace(request_, out=Path("s3://bucket/run"))
    with pytest.raises(ConfigError, match="--out = 's3:/bucket/run': a URL"), opened_run(wrong):
        pass
    assert not list(tmp_path.iterdir())


def test_an_opened_run_is_locked_until_the_block_ends(request_: RunRequest) -> None:
    with opened_run(request_) as opened:
        assert opened.directory.config.read_text() == dump_toml(opened.config)
        with pytest.raises(ConfigError, match="in use by another run"), opened_run(request_):
            pass
    with opened_run(request_):
        pass


def test_what_a_killed_start_left_is_removed_and_nothing_else(
    request_: RunRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{PREFIX}abcdefgh").mkdir(mode=0o700)
    with opened_run(request_) as opened:
        run = opened.directory
    assert not (tmp_path / f"{PREFIX}abcdefgh").exists()
    left = [run.join_file, run.error(3), run.root / "config.partial"]
    left += [run.root / ".identity.json-abcdefgh", run.incidents / "generation-000002.partial"]
    kept = [
        run.root / "notes.txt",
        run.incidents / "generation-000002.json",
        tmp_path / "x.partial",
    ]
    for path in (*left, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (run.root / "link.partial").symlink_to(kept[-1])
    (run.root / "folder.partial").mkdir()
    with opened_run(request_):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in (*kept, run.root / "folder.partial"))
        assert not (run.root / "link.partial").is_symlink()


def test_torch_makes_no_folder_among_temporary_files_while_a_run_is_open(
    request_: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with opened_run(request_) as opened:
        assert cache_dir() == str(opened.directory.log(0).parent)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/named/by/the/user")
    with opened_run(request_):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/named/by/the/user"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/named/by/the/user"


@pytest.mark.mp
@pytest.mark.parametrize(
    ("changes", "fresh"),
    [
        ({"ranks_here": 4}, False),
        ({"ranks_here": 4, "resume": "none"}, True),
        ({"ranks_here": 4, "resume": "none", "attempt": 1}, False),
        ({}, None),
    ],
)
def test_throughput_is_resolved_by_those_who_measure_and_afresh_when_a_run_starts_over(
    request_: RunRequest,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    fresh: bool | None,
) -> None:
    asked: list[tuple[int, bool]] = []

    def resolve(config: Any, root: Path, *, ranks_here: int, fresh: bool, say: object) -> Any:
        asked.append((ranks_here, fresh))
        return with_throughput(config, Throughput(7.0, 5.0))

    monkeypatch.setattr(opening, "resolve_throughput", resolve)
    with opened_run(replace(request_, **changes)) as opened:
        measured = opened.config.train.tflops == 7.0
        assert opened.directory.config.read_text() == dump_toml(opened.config)
    assert asked == ([] if fresh is None else [(4, fresh)])
    assert measured == (fresh is not None)
