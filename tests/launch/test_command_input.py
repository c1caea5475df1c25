"""What a user has got wrong ends the command with one clear line, and harms nothing."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast.launch import cli
from holdfast.parallel.errors import ConfigError
from support.processes.forked_command import ForkedCommand
from support.runs.commands import HOLDFAST, environment, holdfast

BAD: list[tuple[list[str], int, str]] = [
    (["parallel.tensr=2"], 2, "did you mean parallel.tensor"),
    (["parallel.data=16"], 2, "fewer than parallel.data = 16"),
    (
        ["model.heads=3", "model.kv_heads=3"],
        2,
        "model.hidden = 32 is not divisible by model.heads = 3",
    ),
    (["data.kind=text", "data.path=['missing.txt']"], 2, "missing.txt"),
    (["data.kind=text", "data.path=['empty.txt']"], 2, "empty.txt"),
    (["data.kind=text", "data.path=['short.txt']", "model.max_seq_len=9999", "train.seq_len=5000"],
     2, "short.txt"),
    (["data.kind=text", "data.path=['binary.txt']"], 2, "binary.txt"),
    (["optimizer.lr=1e30", "optimizer.min_lr=0", "optimizer.warmup_steps=1",
      "train.clip_grad_norm=0"], 1, "the step was not applied"),
    (["model.init_std=0"], 1, "exactly zero"),
    (["elastic.redundancy=3"], 2, "must be at most 2 shadows"),
]  # fmt: skip


@pytest.mark.mp
@pytest.mark.parametrize(("overrides", "code", "said"), BAD, ids=lambda v: str(v)[:50])
def test_bad_input_ends_with_one_clear_line(
    config: Path, overrides: list[str], code: int, said: str
) -> None:
    (config.parent / "empty.txt").write_text("")
    (config.parent / "short.txt").write_text("a short text\n" * 20)
    (config.parent / "binary.txt").write_bytes(b"text \xff\xfe\x00 no text")
    sets = [part for override in overrides for part in ("--set", override)]
    done = holdfast(config.parent, "train", str(config), "--out", "bad", *sets, timeout_s=60)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1


@pytest.mark.mp
def test_a_token_beyond_the_vocabulary_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'Prepared text: "äöü" and plain words, again and again.\n' * 50
    (config.parent / "text.txt").write_text(text)
    temporary = config.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    prepared = holdfast(config.parent, "data", "prepare", "text.txt", "--output", "tokens")
    assert (prepared.returncode, prepared.stderr) == (0, "")
    assert list(temporary.iterdir()) == []
    monkeypatch.undo()
    sets = ["--set", "data.kind=megatron", "--set", "data.path=['tokens']"]
    sets += ["--set", "parallel.data=1", "--set", "parallel.pipeline=1", "--set", "train.steps=2"]
    fine = holdfast(config.parent, "train", str(config), "--out", "fine", *sets)
    assert fine.returncode == 0, fine.stderr
    done = holdfast(
        config.parent, "train", str(config), "--out", "bad", *sets, "--set", "model.vocab=100"
    )
    assert done.returncode == 2, done.stderr
    assert "vocab" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.mp
def test_unreadable_configurations_are_named(tmp_path: Path) -> None:
    missing = holdfast(tmp_path, "train", "nothing.toml")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "nothing.toml cannot be read" in missing.stderr
    (tmp_path / "broken.toml").write_text("[model\n")
    broken = holdfast(tmp_path, "plan", "broken.toml")
    assert broken.returncode == 2
    assert "broken.toml is not valid TOML" in broken.stderr


@pytest.mark.mp
def test_a_configuration_from_standard_input_is_read_before_and_after_a_restart(
    config: Path,
) -> None:
    """A run that offloads starts its process again, with another heap."""
    done = subprocess.run(
        [*HOLDFAST, "train", "-", "--set", "offload.activations=ssd", "--resume", "nowhere"],
        cwd=config.parent,
        env=environment(),
        input=config.read_text(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("holdfast: --resume nowhere: ")
    assert not list(config.parent.glob("runs/*"))


def test_a_folder_without_a_run_is_not_resumed(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.application("resume"), ["resume", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert "has no config.toml" in str(done.exception)


@pytest.mark.mp
def test_all_problems_are_listed_at_once(config: Path) -> None:
    sets = [
        "--set",
        "model.heads=3",
        "--set",
        "train.global_batch=9",
        "--set",
        "train.micro_batch=2",
    ]
    done = holdfast(config.parent, "plan", str(config), *sets)
    assert done.returncode == 2
    assert "model.heads = 3" in done.stderr
    assert "train.global_batch = 9" in done.stderr


@pytest.mark.mp
def test_another_run_is_not_overwritten(config: Path) -> None:
    run = config.parent / "out"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    done = holdfast(config.parent, "train", str(config), "--out", "out")
    assert done.returncode == 2
    assert "already holds another run" in done.stderr
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.mp
def test_a_port_in_use_is_named(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        errors = config.parent / "errors"
        worker = ForkedCommand(
            [str(config), "--set", "parallel.data=2", "--set", "parallel.pipeline=1"],
            config.parent / "printed",
            environment(
                RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK="0"
            ),
            folder=config.parent,
            errors=errors,
            module="holdfast.trainer",
        )
        code = worker.wait(timeout=60)
    assert code == 3
    assert f"127.0.0.1:{port}" in errors.read_text()
    assert "Traceback" not in errors.read_text()


@pytest.mark.mp
def test_a_name_that_is_no_text_ends_with_one_line(config: Path) -> None:
    done = holdfast(config.parent, "train", str(config), "--out", os.fsdecode(b"run\xff"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert r"argument 4, run\udcff: is not text in utf-8" in done.stderr
