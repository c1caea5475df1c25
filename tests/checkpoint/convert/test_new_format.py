"""A format is one module and one line of the registry: it is recognised, read and written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from holdfast.checkpoint import load, save
from holdfast.checkpoint.convert.elements import Output, stored, units_of
from holdfast.checkpoint.convert.formats import registry
from holdfast.checkpoint.convert.sources import (
    Catalog,
    ReadOptions,
    WriteOptions,
    choose_output_dtypes,
    make_catalog,
)
from holdfast.checkpoint.convert.work.job import convert
from holdfast.checkpoint.convert.work.request import Conversion
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import Box


def is_raw(path: Path) -> bool:
    return (path / "raw.json").is_file()


def read(path: Path, options: ReadOptions) -> Catalog:
    entries = json.loads((path / "raw.json").read_text())
    tensors = [stored(key, dtype, shape, "raw.bin", at) for key, dtype, shape, at in entries]
    catalog = make_catalog("huggingface", path, tensors, options)
    catalog.format = "raw"
    return catalog


def plan(catalog: Catalog, options: WriteOptions) -> Output:
    typed = choose_output_dtypes(catalog, options.dtype, masters=False)
    entries, units, at = [], [], 0
    for tensor, dtype in typed:
        found = list(units_of(tensor, Box.whole(tensor.shape), dtype, "raw.bin", at))
        entries.append((tensor.name, dtype, list(tensor.shape), at))
        units += found
        at += sum(unit.bytes for unit in found)

    def finish(folder: Path, checksums: Sequence[int]) -> None:
        (folder / "raw.json").write_text(json.dumps(entries))

    return Output({"raw.bin": at}, units, finish, typed)


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The format, as a module in checkpoint/convert/formats and a line of its registry would be."""
    module: Any = SimpleNamespace(read=read, plan=plan)
    monkeypatch.setitem(sys.modules, "holdfast.checkpoint.convert.formats.raw", module)
    line: Any = {"raw": registry.Format("raw", is_raw)}
    with mock.patch.dict(registry.FORMATS, line):  # type: ignore[arg-type]
        yield


def test_a_registered_format_is_written_recognised_and_read(raw: None, tmp_path: Path) -> None:
    weights = {"a.weight": torch.arange(12.0).view(3, 4), "b.bias": torch.ones(5)}
    save(tmp_path / "ours", weights, step=1)
    written = convert(Conversion(tmp_path / "ours", tmp_path / "raw", "raw"))
    assert written is not None
    assert (tmp_path / "raw/raw.bin").stat().st_size == 4 * 17
    back = convert(Conversion(tmp_path / "raw", tmp_path / "back", "holdfast"))
    assert back is not None
    assert back.source_format == "raw"
    found = {name: torch.zeros_like(value) for name, value in weights.items()}
    load(tmp_path / "back", found)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_an_unregistered_format_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    save(tmp_path / "ours", {"a": torch.ones(2)}, step=1)
    with pytest.raises(ConfigError, match=r"--to = 'raw': allowed are 'holdfast', .*'hf'"):
        convert(Conversion(tmp_path / "ours", tmp_path / "out", "raw"))
    with pytest.raises(ConfigError, match=r"--to = 'deepspeed': allowed are .*mean 'deepspeed-un"):
        convert(Conversion(tmp_path / "ours", tmp_path / "out", "deepspeed"))
    with pytest.raises(ConfigError, match=r"--from = 'raw': allowed are 'holdfast', .*'files'"):
        convert(Conversion(tmp_path / "ours", tmp_path / "out", "hf", source_format="raw"))
