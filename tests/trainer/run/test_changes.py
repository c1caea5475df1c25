"""A run whose data or folder has moved goes on, and other changes only by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.checkpoint.format import encode_manifest
from holdfast.checkpoint.stores import LocalStore
from holdfast.launch import cli
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import RunConfig, allowed_changes, anchored, load_config
from holdfast.trainer.run.opening import RunRequest, opened_run
from holdfast.trainer.run.resume import check_same_data, find_resume
from holdfast.trainer.step import open_split
from support.oracles.transformers_models import DEEPSEEK
from support.runs.commands import CONFIG, holdfast
from support.runs.kept_runs import save_as_run
from support.runs.small_runs import make_config

TEXT = "one and the same text. " * 200


def config_of(*path: Path | str, **train: Any) -> RunConfig:
    data = {"kind": "text", "path": [str(p) for p in path]}
    return make_config(data=data, model={"vocab": 300}, train=train)


def saved_run(root: Path, config: RunConfig, fingerprint: str | None) -> None:
    """A run with one checkpoint, of data with this fingerprint."""
    save_as_run(root / "checkpoints", anchored(config), 3)
    store = LocalStore(root / "checkpoints")
    manifest = store.manifest("step-00000003")
    scalars = {**manifest.scalars, "data_fingerprint": fingerprint}
    kept = msgspec.structs.replace(manifest, scalars=scalars)
    (root / "checkpoints/step-00000003/manifest.json").write_bytes(encode_manifest(kept))


def test_the_content_of_data_counts_and_not_its_name(tmp_path: Path) -> None:
    before, after = tmp_path / "before.txt", tmp_path / "elsewhere/after.txt"
    after.parent.mkdir()
    before.write_text(TEXT)
    run = tmp_path / "run"
    saved_run(run, config_of(before), open_split(config_of(before), "train").fingerprint)
    before.rename(after)
    assert find_resume(run, config_of(after), "auto").candidates
    changed = config_of(after, seed=5)
    with pytest.raises(ConfigError) as caught:
        find_resume(run, changed, "auto")
    assert "data.path" not in str(caught.value)
    after.write_text(TEXT + "and more")
    with pytest.raises(ConfigError, match=r"data\.path = .*after.* --allow-change data\.path$"):
        find_resume(run, config_of(after), "auto")
    assert find_resume(run, config_of(after), "auto", allow_change=("data.path",)).candidates
    # Without a fingerprint nothing but the name is known.
    saved_run(tmp_path / "old", config_of(before), None)
    with pytest.raises(ConfigError, match=r"data\.path = "):
        find_resume(tmp_path / "old", config_of(after), "auto")


def test_only_the_keys_that_are_named_may_change(tmp_path: Path) -> None:
    saved_run(tmp_path, make_config(), None)
    changed = make_config(train={"seed": 5, "seq_len": 8})

    def told(*allowed: str) -> str:
        with pytest.raises(ConfigError) as caught:
            find_resume(tmp_path, changed, "auto", allow_change=allowed)
        return str(caught.value)

    option = "go on all the same with --allow-change train.seed,train.seq_len"
    assert "train.seed = 5" not in told("train.seed")
    assert "train.seq_len = 8 (the checkpoint has 16)" in told("train.seed")
    for allowed in ((), ("train.seed",), ("data.path",), ("",)):
        assert option in told(*allowed)
    assert "allows the keys that it names" in told("")
    both = allowed_changes(["train.seed, train.seq_len"], changed)
    assert find_resume(tmp_path, changed, "auto", allow_change=both).candidates


def test_the_factor_of_second_tokens_may_be_lowered(tmp_path: Path) -> None:
    def config_with(**model: Any) -> RunConfig:
        return make_config(model={**DEEPSEEK, "multi_token_layers": 1, **model})

    saved_run(tmp_path, config_with(), None)
    found = find_resume(tmp_path, config_with(multi_token_loss_coef=0.1), "auto")
    assert found.notes == (
        "changed since the checkpoint: model.multi_token_loss_coef = 0.1 (was 0.3)",
    )
    with pytest.raises(ConfigError, match=r"model\.multi_token_layers = 0"):
        find_resume(tmp_path, config_with(multi_token_layers=0), "auto")


def test_another_learning_rate_of_the_next_step_is_told(tmp_path: Path) -> None:
    def notes(**optimizer: Any) -> list[str]:
        constant = {"schedule": "constant", "warmup_steps": 0, "lr": 1e-3, **optimizer}
        config = make_config(train={"steps": 8}, optimizer=constant)
        if not optimizer:
            saved_run(tmp_path, config, None)
        found = find_resume(tmp_path, config, "auto").notes
        return [note for note in found if "learning rate" in note]

    assert notes() == []
    assert notes(decay_steps=4) == []
    assert notes(decay_steps=8, min_lr=3e-4) == [
        "the learning rate of step 4 is 0.0007; as the checkpoint has it, it would be 0.001"
    ]


def test_data_that_has_changed_under_its_name_is_allowed_by_that_name(tmp_path: Path) -> None:
    saved_run(tmp_path, make_config(), "the one")
    manifest = LocalStore(tmp_path / "checkpoints").manifest("step-00000003")
    for allowed in ((), ("train.micro_batch",), ("",)):
        with pytest.raises(ConfigError, match=r"on other data.*--allow-change data\.path"):
            check_same_data(manifest, "another", "here", allow_change=allowed)
    check_same_data(manifest, "the one", "here", allow_change=())
    for key in ("data.path", "train.seed", "*"):
        check_same_data(manifest, "another", "here", allow_change=(key,))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("data.pth", "did you mean data.path?"),
        ("seed", "did you mean data.seed or train.seed?"),
        ("*", "write section.key, as data.path"),
        ("data.path,model.hiden", "did you mean model.hidden?"),
    ],
)
def test_a_key_that_does_not_exist_is_answered_by_the_nearest(value: str, told: str) -> None:
    with pytest.raises(ConfigError, match="--allow-change") as caught:
        allowed_changes([value], make_config())
    assert str(caught.value).endswith(told)


def test_the_option_without_a_key_does_not_take_the_next_option_for_one() -> None:
    words = ["train", "c.toml", "--allow-change", "--set", "train.steps=2", "--allow-change"]
    given = cli._with_bare_option(words)
    assert given[2:] == ["--allow-change=", "--set", "train.steps=2", "--allow-change="]
    named = ["--allow-change", "data.path", "--allow-change=train.seed"]
    assert cli._with_bare_option(named) == named


def test_a_run_can_be_used_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here/run.toml").write_text(
        '[model]\nfamily = "llama"\nlayers = 1\nhidden = 96\n'
        '[data]\nkind = "text"\npath = ["mine.txt", "~/x"]\n'
        '[checkpoint]\npath = "saved"\n[offload]\npath = "drive"\n'
    )
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(Path("run.toml"))
    (tmp_path / "here/mine.txt").write_text(TEXT)
    moved = anchored(config)
    assert moved.data.path == [str(tmp_path / "here/mine.txt"), "/home/me/x"]
    assert moved.data.tokenizer == "bytes"
    assert moved.checkpoint.path == str(tmp_path / "here/saved")
    assert moved.offload.path == str(tmp_path / "here/drive")
    assert anchored(moved) == moved
    given = RunRequest(Path("run.toml"), config_of("mine.txt"), out=Path("run"))
    with opened_run(given):
        pass
    monkeypatch.chdir(tmp_path)
    kept = load_config(tmp_path / "here/run/config.toml")
    assert kept.data.path == [str(tmp_path / "here/mine.txt")]


@pytest.mark.mp
def test_a_run_is_proved_and_resumed_from_another_folder_with_moved_data(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "mine.txt").write_text(TEXT)
    data = '[data]\nkind = "text"\npath = ["mine.txt"]\n[checkpoint]\nevery = 1\n'
    (here / "run.toml").write_text(CONFIG.replace("data = 2\npipeline = 2", "data = 1") + data)
    begun = holdfast(here, "train", "run.toml", "--out", "run", "--set", "train.stop_after=2")
    assert begun.returncode == 0, begun.stderr
    first, second = (str(here / f"run/checkpoints/step-0000000{step}") for step in (1, 2))
    proved = holdfast(there, "prove", first, second)
    assert proved.returncode == 0, proved.stderr
    (here / "mine.txt").rename(there / "moved.txt")
    resumed = holdfast(there, "resume", str(here / "run"), "--set", 'data.path=["moved.txt"]')
    assert resumed.returncode == 0, resumed.stderr
