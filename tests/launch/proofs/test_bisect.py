"""`holdfast bisect` and `audit` on real runs with planted differences."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.trainer.reports import broken_links, read_digests
from support.runs.commands import holdfast, lines_of
from support.soak import only_in_soak

STEPS = 16
MOST_REPEATED = math.ceil(math.log2(STEPS)) + 1
CONFIG = f"""
[model]
family = "llama"
layers = 2
hidden = 32
intermediate = 48
heads = 4
kv_heads = 2
vocab = 260
[data]
kind = "text"
path = ["text.txt"]
[train]
steps = {STEPS}
seq_len = 32
global_batch = 4
micro_batch = 1
context_chunks = 2
[numerics]
tensor_shards = 2
[optimizer]
lr = 1e-2
warmup_steps = 2
[checkpoint]
every = 2
keep = 0
[log]
tensorboard = false
"""
OTHER_LAYOUT = ("--set", "parallel.pipeline=2")
TEXT = "".join(chr(97 + n * n % 23) for n in range(5000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it, `first`."""
    made = tmp_path_factory.mktemp("bisect")
    (made / "run.toml").write_text(CONFIG)
    (made / "text.txt").write_text(TEXT)
    train(made, "first")
    return made


def train(folder: Path, out: str, *more: str, config: str = "run.toml") -> None:
    done = holdfast(folder, "train", config, "--out", out, *more)
    assert done.returncode == 0, done.stdout + done.stderr


def bisected(folder: Path, second: str, *more: str, first: str = "first") -> dict[str, Any]:
    done = holdfast(folder, "bisect", first, second, "--json", *more)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["equal"] else 1), done.stderr
    return found


def repeated_of_each(found: dict[str, Any]) -> float:
    return found["repeated"] / 2


@pytest.mark.slow
def test_layouts_and_losses_leave_the_same_digests(folder: Path) -> None:
    layouts = {
        "wide": ("parallel.data=2", "parallel.tensor=2"),
        "deep": ("parallel.pipeline=2", "parallel.schedule=zb-h1", "parallel.context=2"),
        "elastic": ("elastic.enabled=true", "parallel.data=2", "elastic.respawn=false"),
    }
    for out, keys in layouts.items():
        extra = [word for key in keys for word in ("--set", key)]
        if out == "elastic":
            fault = "[{fault='kill', rank=1, step=5, phase='backward'}]"
            extra += ["--set", f"elastic.chaos={fault}"]
        train(folder, out, *extra)
        chain = (folder / out / "digests.jsonl").read_bytes()
        assert chain == (folder / "first" / "digests.jsonl").read_bytes(), out
    assert any(
        line["event"] == "rank_lost" for line in lines_of(folder / "elastic" / "events.jsonl")
    )
    done = holdfast(folder, "bisect", "first", "elastic")
    assert done.returncode == 0
    assert done.stdout == "the same bits in all 16 steps that both have, 1 to 16\n"


@pytest.mark.slow
def test_another_learning_rate_is_found_in_the_update(folder: Path) -> None:
    train(folder, "rate", "--set", "train.stop_after=9", *OTHER_LAYOUT)
    train(folder, "rate", "--set", "optimizer.lr=2e-2", "--resume", "auto", *OTHER_LAYOUT)
    found = bisected(folder, "rate")
    assert (found["where"]["step"], found["where"]["kind"]) == (10, "update")
    assert found["settings"] == ["optimizer.lr = 0.01 in A and 0.02 in B"]
    assert found["reproduced"] == [True, True]
    assert found["operation"] is None
    assert found["tensor"]["name"] == "model.embed_tokens.weight"
    assert repeated_of_each(found) <= MOST_REPEATED


@pytest.mark.slow
def test_one_changed_token_is_named(folder: Path) -> None:
    lines = lines_of(folder / "first" / "digests.jsonl")
    place = 3001
    text = TEXT[:place] + ("#" if TEXT[place] != "#" else "!") + TEXT[place + 1 :]
    (folder / "other.txt").write_text(text)
    train(folder, "token", "--set", "data.path=['other.txt']", *OTHER_LAYOUT)
    other = lines_of(folder / "token" / "digests.jsonl")
    step = next(a["step"] for a, b in zip(lines, other, strict=True) if a != b)
    found = bisected(folder, "token")
    assert (found["where"]["step"], found["where"]["kind"]) == (step, "gradients")
    old, new = ord(TEXT[place]), ord(text[place])
    assert re.search(rf"sample \d+ .* {old} in A and {new} in B", found["token"])
    assert found["reproduced"] == [True, True]
    assert found["element"] is not None
    assert repeated_of_each(found) <= MOST_REPEATED


@pytest.mark.slow
@only_in_soak
def test_another_kernel_is_found_at_its_first_module(folder: Path) -> None:
    train(folder, "kernel", "--set", "train.compile=true", "--set", "parallel.data=2")
    found = bisected(folder, "kernel")
    assert (found["where"]["step"], found["where"]["kind"]) == (1, "gradients")
    assert found["settings"] == ["train.compile = False in A and True in B"]
    assert found["reproduced"] == [True, True]
    assert "block_0" in found["output"]["first"]["module"]
    element = found["element"]
    assert element["first"] != element["second"]
    assert abs(element["first"] - element["second"]) < 1e-4
    assert repeated_of_each(found) <= MOST_REPEATED


@pytest.mark.chaos
def test_one_flipped_bit_is_no_matter_of_settings(folder: Path) -> None:
    fault = "[{fault='corrupt-compute', rank=1, step=7, seconds=0.0}]"
    extra = ("elastic.enabled=true", "parallel.data=2")
    words = [word for key in extra for word in ("--set", key)]
    train(folder, "flipped", *words, "--set", f"elastic.chaos={fault}")
    found = bisected(folder, "flipped")
    assert (found["where"]["step"], found["where"]["kind"]) == (7, "gradients")
    assert found["settings"] == []
    assert found["reproduced"] == [True, False]
    assert (found["operation"], found["tensor"]) == (None, None)
    assert repeated_of_each(found) <= MOST_REPEATED


@pytest.mark.slow
@pytest.mark.skipif(
    "HOLDFAST_SOAK_S" not in os.environ, reason="trains a dozen times more: make soak"
)
def test_sparse_digests_are_narrowed_down(folder: Path) -> None:
    sparse = ("--set", "log.digests_every=5")
    train(folder, "sparse", *sparse)
    train(folder, "sparse-rate", "--set", "train.stop_after=7", *sparse)
    train(folder, "sparse-rate", "--set", "optimizer.lr=2e-2", *sparse)
    found = bisected(folder, "sparse-rate", first="sparse")
    assert found["where"] == {"step": 8, "kind": "update", "layers": [0, 1, 2, 3], "equal_until": 8}


@pytest.mark.slow
def test_steps_are_confirmed_in_any_layout_and_lies_are_not(folder: Path) -> None:
    for layout in ((), ("--set", "parallel.pipeline=2", "--set", "parallel.data=2")):
        done = holdfast(folder, "audit", "first", "--steps", "6:8", *layout)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3 steps, 6 to 8, trained again from step 4" in done.stdout

    def told(change: Callable[[list[dict[str, Any]]], object]) -> tuple[int, dict[str, Any]]:
        shutil.rmtree(folder / "lie", ignore_errors=True)
        shutil.copytree(folder / "first", folder / "lie")
        lines = lines_of(folder / "lie" / "digests.jsonl")
        change(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "lie" / "digests.jsonl").write_text(text)
        done = holdfast(folder, "audit", "lie", "--steps", "6:8", "--json")
        return done.returncode, json.loads(done.stdout)

    code, found = told(lambda lines: lines[6].update(loss_hex="0x1p+0"))
    assert (code, found["broken"], found["where"]["step"]) == (1, [7], 7)
    code, found = told(lambda lines: lines.pop(2))
    assert (code, found["broken"], found["where"]) == (1, [4], None)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    done = holdfast(tmp_path, "bisect", "here", "there")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "holdfast: here has no config.toml, so it is not the folder of a run\n"
    done = holdfast(tmp_path, "audit", "here", "--steps", "5")
    assert done.returncode == 2
    assert "write two steps with a colon" in done.stderr


@pytest.mark.slow
def test_a_resumed_run_continues_its_chain(folder: Path) -> None:
    train(folder, "resumed", "--set", "train.stop_after=5")
    train(folder, "resumed")
    lines = read_digests(folder / "resumed" / "digests.jsonl")
    assert [line.digests.step for line in lines] == list(range(1, STEPS + 1))
    assert broken_links(lines) == []
    assert lines == read_digests(folder / "first" / "digests.jsonl")
