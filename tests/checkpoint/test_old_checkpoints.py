"""Checkpoints that version 0.1 wrote open, verify, load and convert; damaged ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from holdfast.checkpoint import Checkpointer, load
from holdfast.parallel.errors import CheckpointError
from support.runs.commands import holdfast
from support.runs.golden_runs import assert_near, read_records, runs_of_kind, this_kind
from support.runs.old_runs import (
    OLD,
    RUNS,
    checkpoint_of,
    command,
    copy_of,
    damages,
    digest_of,
    do_damage,
    expected_of,
    json_of,
)
from support.runs.plain_program import PlainProgram

pytestmark = [pytest.mark.mp]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "I64": torch.int64}
SAVED = (*RUNS, "program")
PROGRAM = OLD / "program" / "step-00000003"


def _place(name: str) -> Path:
    return PROGRAM if name == "program" else checkpoint_of(name)


def _empty(name: str) -> dict[str, torch.Tensor]:
    """A tensor to load into for each that the checkpoint has, by what `inspect` said of it."""
    return {
        tensor["name"]: torch.zeros(tensor["shape"], dtype=DTYPES[tensor["dtype"]])
        for tensor in expected_of(name)["inspect"]["tensors"]
    }


@pytest.mark.parametrize("name", SAVED)
def test_inspect_says_what_it_said(tmp_path: Path, name: str) -> None:
    code, printed = command(tmp_path, "inspect", str(_place(name)), "--json")
    assert code == 0, printed
    found = json_of(printed)
    assert found.pop("path") == str(_place(name))
    assert found == expected_of(name)["inspect"]


@pytest.mark.parametrize("name", SAVED)
def test_verify_finds_nothing_wrong(tmp_path: Path, name: str) -> None:
    code, printed = command(tmp_path, "verify", str(_place(name)), "--json")
    assert code == 0, printed
    assert json_of(printed) == {"path": str(_place(name)), "ok": True, "problems": []}


def test_commands_that_end_well_write_nothing_to_standard_error(tmp_path: Path) -> None:
    place = str(checkpoint_of(next(iter(RUNS))))
    converted = ["convert", place, "converted", "--to", "hf"]
    for arguments in (["verify", place], ["inspect", place], ["diff", place, place], converted):
        done = holdfast(tmp_path, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments


@pytest.mark.parametrize("name", SAVED)
def test_every_tensor_loads_with_its_bits(name: str) -> None:
    state = _empty(name)
    load(_place(name), state)
    assert {key: digest_of(value) for key, value in state.items()} == expected_of(name)["tensors"]
    assert len(state) > 20


@pytest.mark.parametrize("name", SAVED)
def test_diff_finds_it_equal_to_itself_and_to_no_other(tmp_path: Path, name: str) -> None:
    place = _place(name)
    same, printed = command(tmp_path, "diff", str(place), str(place), "--json")
    assert same == 0, printed
    assert json_of(printed)["compared"] == len(expected_of(name)["tensors"])
    other = "tied" if name == "fp32" else "fp32"
    assert command(tmp_path, "diff", str(place), str(_place(other)))[0] == 1


def test_diff_counts_the_elements_that_two_steps_of_a_run_changed(tmp_path: Path) -> None:
    later = checkpoint_of("half-way")
    earlier = later.with_name("step-00000002")
    code, printed = command(tmp_path, "diff", str(earlier), str(later), "--json")
    assert code == 1, printed
    found = json_of(printed)
    assert found["steps"] == [2, 4]
    assert (found["only_first"], found["only_second"], found["other_form"]) == ([], [], [])
    counts = {value["name"]: value["differing"] for value in found["values"]}
    assert counts == expected_of("half-way")["changed since step 2"]


@pytest.mark.parametrize("name", RUNS)
def test_a_lost_manifest_is_made_again_with_the_same_tensors(tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(checkpoint_of(name), tmp_path / "step-00000004"))
    (copy / "manifest.json").unlink()
    code, printed = command(tmp_path, "verify", str(copy), "--rebuild")
    assert code == 0, printed
    state = _empty(name)
    load(copy, state)
    assert {key: digest_of(value) for key, value in state.items()} == expected_of(name)["tensors"]


@pytest.mark.parametrize("name", RUNS)
def test_converting_gives_the_same_hugging_face_folder(tmp_path: Path, name: str) -> None:
    """Read with safetensors' own reader."""
    out = tmp_path / "hf"
    code, printed = command(tmp_path, "convert", str(checkpoint_of(name)), str(out), "--to", "hf")
    assert code == 0, printed
    found: dict[str, list[str]] = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                value = file.get_tensor(key)
                found[key] = [str(value.dtype).removeprefix("torch."), digest_of(value)]
    assert found == expected_of(name)["hf"]
    described = [json.loads((place / "config.json").read_text()) for place in (out, _place(name))]
    assert described[0] == described[1]


@pytest.mark.parametrize("damage", damages(), ids=lambda damage: damage["what"])
def test_damage_is_found_and_named(tmp_path: Path, damage: Mapping[str, Any]) -> None:
    copy = copy_of(damage["run"], tmp_path) / "checkpoints" / "step-00000004"
    do_damage(copy, damage)
    code, printed = command(tmp_path, "verify", str(copy), "--json")
    assert code == 1, printed
    assert damage["file"] in printed
    if damage["problems"] is None:
        assert "Traceback" not in printed
        assert len(printed.split("\n")) <= 3
    else:
        problems = json_of(printed)["problems"]
        assert all(problem.pop("message") for problem in problems)
        assert problems == damage["problems"]


@pytest.mark.parametrize(
    "damage",
    [damage for damage in damages() if "add" not in damage],
    ids=lambda damage: damage["what"],
)
def test_what_is_damaged_does_not_load(tmp_path: Path, damage: Mapping[str, Any]) -> None:
    copy = copy_of(damage["run"], tmp_path) / "checkpoints" / "step-00000004"
    do_damage(copy, damage)
    with pytest.raises(CheckpointError) as caught:
        load(copy, _empty(damage["run"]))
    assert damage["file"] in str(caught.value)


def test_a_plain_program_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Model, optimizer, schedule, random state and a plain value, saved after three steps."""
    [record] = read_records(OLD / "continued.json")
    recorded = record.runs["program"]
    program = PlainProgram(1)
    folder = copy_of("program", tmp_path)
    with Checkpointer(folder, program.state()) as checkpointer:
        assert checkpointer.load() == 3
        assert checkpointer.loaded["note"] == "seed 0"
    assert digest_of(program.random) == expected_of("program")["tensors"]["random"]
    assert program.schedule.last_epoch == 3
    goes_on = type(recorded)(losses=program.train(3))
    last = type(recorded)(losses=recorded.losses[3:])
    assert_near(goes_on, last, "fp32")
    if runs_of_kind([record], this_kind()) is not None:
        assert goes_on == last
