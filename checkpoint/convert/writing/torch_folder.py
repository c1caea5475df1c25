"""Folders of torch.save files, laid out before any tensor's bytes are known."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import LogicalTensor, Unit, combine_crc32, units_of
from holdfast.checkpoint.convert.writing.torch_writing import (
    TensorToCome,
    TorchLayout,
    lay_out,
)
from holdfast.checkpoint.stores import open_written
from holdfast.parallel.layout import Box


@dataclass(frozen=True, slots=True)
class _File:
    """A torch.save file that will be written."""

    name: str
    layout: TorchLayout
    units: tuple[range, ...]
    """The units of each of its tensors."""
    constants: tuple[bytes, ...] = ()
    """The contents of its tensors that are made here."""


class TorchFolder:
    """Collects the files of an output; the bytes of tensors are written later, in place."""

    def __init__(self) -> None:
        self.files: list[_File] = []
        self.units: list[Unit] = []

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes, by name in the output."""
        return {file.name: file.layout.bytes for file in self.files}

    def add(
        self, name: str, content: Any, tensors: Sequence[tuple[TensorToCome, LogicalTensor]]
    ) -> None:
        """Add a file.

        Args:
            content: the value that torch.load will give, with `TensorToCome` for tensors.
            tensors: these tensors in the order of their numbers, each with the source of its bytes.
        """
        layout = lay_out(content, [come for come, _ in tensors])
        spans = []
        for (come, tensor), start in zip(tensors, layout.starts, strict=True):
            first = len(self.units)
            self.units += units_of(tensor, Box.whole(tensor.shape), come.dtype, name, start)
            spans.append(range(first, len(self.units)))
        self.files.append(_File(name, layout, tuple(spans)))

    def add_number(self, name: str, value: float, wrap: Any = None) -> None:
        """Add a file with a tensor of one number; `wrap` puts it into other content."""
        come = TensorToCome(0, "F32", ())
        layout = lay_out(come if wrap is None else wrap(come), [come])
        content = struct.pack("<f", value)
        self.files.append(_File(name, layout, (range(0),), (content,)))

    def write(self, folder: Path, checksums: Sequence[int]) -> None:
        """Write everything but the units' bytes.

        Args:
            checksums: the CRC-32 of each unit.
        """
        for file in self.files:
            crcs = []
            for number, span in enumerate(file.units):
                crc = zlib.crc32(file.constants[number]) if file.constants else 0
                for unit in span:
                    crc = combine_crc32(crc, checksums[unit], self.units[unit].bytes)
                crcs.append(crc)
            with open_written(folder / file.name) as opened:
                for at, content in file.layout.parts(crcs):
                    opened.seek(at)
                    opened.write(content)
                for constant, start in zip(file.constants, file.layout.starts, strict=False):
                    opened.seek(start)
                    opened.write(constant)
