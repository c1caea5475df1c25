"""Whatever a checkpoint says of a program's state, a load ends with values or with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import load, save
from holdfast.checkpoint.format import MANIFEST, crc32c_of
from holdfast.checkpoint.program.documents import checked
from holdfast.checkpoint.program.values import TAG
from holdfast.parallel.errors import CheckpointError
from support.runs.mutations import COUNT, mutated


def program() -> dict[str, Any]:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    values = {"seen": (1, {2.5}), "mean": torch.ones(3), "kind": torch.bfloat16}
    return {"model": model, "optimizer": optimizer, "values": values}


def write(folder: Path, document: dict[str, Any], scalars: bytes) -> None:
    """Write a manifest with a right checksum and these scalars."""
    others = {key: value for key, value in document.items() if key not in ("crc32c", "scalars")}
    kept = json.dumps(others).encode()[:-1] + b',"scalars":' + scalars
    (folder / MANIFEST).write_bytes(kept + f',"crc32c":"{crc32c_of(kept):08x}"}}\n'.encode())


def refusal(folder: Path, document: dict[str, Any], scalars: bytes) -> str:
    """Why a checkpoint with these scalars is not loaded; "" if it is."""
    write(folder, document, scalars)
    try:
        load(folder, program())
    except CheckpointError as error:
        return str(error)
    return ""


def test_any_state_is_loaded_or_refused_in_one_line(tmp_path: Path) -> None:
    folder = Path(save(tmp_path, program(), step=1))
    document = json.loads((folder / MANIFEST).read_bytes())
    write(folder, document, json.dumps(document["scalars"]).encode())
    load(folder, program())
    refusals = [
        refusal(folder, document, mutated(document["scalars"], number)) for number in range(COUNT)
    ]
    assert all(told.isprintable() for told in refusals)
    assert 0 < refusals.count("") < COUNT / 2


@pytest.mark.parametrize("step", [[1], "1", -1, 1.5, 1 << 70, None])
def test_a_count_that_is_no_number_is_refused_by_its_name(tmp_path: Path, step: object) -> None:
    folder = Path(save(tmp_path, program(), step=1))
    document = json.loads((folder / MANIFEST).read_bytes())
    for name in ("step", "optimizer_step", "samples"):
        write(folder, document, json.dumps({**document["scalars"], name: step}).encode())
        with pytest.raises(CheckpointError, match=name):
            load(folder, program())


@pytest.mark.parametrize(
    "document",
    [
        {TAG: "module", "tensors": {"a": {}}, "extra": {}},
        {TAG: "module", "tensors": {}},
        {TAG: "optimizer", "groups": [{"params": [{}]}], "state": {}, "other": []},
        {TAG: "optimizer", "groups": [{}], "state": {}, "other": []},
        {TAG: "optimizer", "groups": [], "state": {}, "other": [[1]]},
        {TAG: "ranks", "value": 3},
        {TAG: "tensor", "name": []},
    ],
)
def test_a_document_without_its_parts_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="checkpoint's key is damaged"):
        checked(document, "key")
