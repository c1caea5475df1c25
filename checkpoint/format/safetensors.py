"""The header of a safetensors file and the index of several, of any origin, read strictly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.checkpoint.format.files import Extents, header_bytes
from holdfast.parallel.errors import CheckpointError, Unreadable, shown
from holdfast.parallel.reading import Count, decode_json, open_regular


class HeaderEntry(msgspec.Struct, frozen=True):
    """A tensor in a header."""

    dtype: str
    shape: Extents
    data_offsets: tuple[Count, Count]
    """The first byte, and the one after the last, from the beginning of the data."""


class _Index(msgspec.Struct):
    weight_map: dict[str, Annotated[str, Meta(min_length=1, max_length=4096)]]


def read_header(path: Path) -> tuple[int, bytes]:
    """The size of a safetensors file, and its header with the 8 bytes that tell its length.

    Raises:
        CheckpointError: it is no regular file, cannot be read, or has no header.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = header_bytes(first, size, str(path))
            return size, first + file.read(length - 8)
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error


def decode_entries(header: bytes, where: str) -> dict[str, HeaderEntry]:
    """The tensors in a header that `read_header` returned, by key.

    Raises:
        CheckpointError: it is not as safetensors writes it.
    """
    try:
        entries = decode_json(header[8:], dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: its header is not JSON ({error})") from error
    found: dict[str, HeaderEntry] = {}
    for key, raw in entries.items():
        try:
            found[key] = decode_json(bytes(raw), HeaderEntry)
        except ValueError as error:
            told = f"the entry of {shown(key)} in its header is wrong: {error}"
            raise CheckpointError(f"{where} is damaged: {told}") from error
    return found


def decode_index(content: bytes, where: str) -> dict[str, str]:
    """The file that holds each weight, by an index's content.

    Raises:
        CheckpointError: it is no index, or names what cannot be a file of the same folder.
    """
    try:
        found = decode_json(content, _Index).weight_map
        for name in found.values():
            if "/" in name or "\0" in name or name in (".", ".."):
                raise ValueError(f"{shown(name)} is no name of a file in its folder")
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    return found
