"""Conversions in this process, and what a checkpoint of ours has afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoint import load
from holdfast.checkpoint.convert.work.job import Converted, convert
from holdfast.checkpoint.convert.work.request import Conversion
from holdfast.checkpoint.format.dtypes import TORCH_DTYPES
from holdfast.checkpoint.stores.registry import find_checkpoint


def converted(source: Path, target: Path, to: str, **keys: Any) -> Converted:
    """Convert a checkpoint, with further fields of `Conversion`."""
    found = convert(Conversion(source, target, to, **keys))
    assert found is not None
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of ours."""
    manifest = find_checkpoint(folder).manifest()
    found = {
        name: torch.zeros(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        for name, entry in manifest.tensors.items()
    }
    load(folder, found)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
