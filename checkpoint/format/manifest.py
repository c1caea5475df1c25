"""Headers and the manifest, made from a write plan and the ranks' reports. Pure; needs no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.format.files import (
    INDEX,
    FileEntry,
    Manifest,
    PieceEntry,
    crc32c_of,
    encode_header,
    huggingface_index,
)
from holdfast.checkpoint.format.plan_types import PlannedFile, WritePlan
from holdfast.parallel.errors import CheckpointError

Checksums = Mapping[int, Sequence[int]]
"""By rank: the CRC-32C of each piece that it writes, in the order of `WritePlan.written_by`."""


def _by_place(plan: WritePlan, checksums: Checksums) -> dict[tuple[str, int], int]:
    found: dict[tuple[str, int], int] = {}
    for rank, values in checksums.items():
        for piece, crc in zip(plan.written_by(rank), values, strict=True):
            found[piece.file, piece.offset] = crc
    return found


def _entries(
    file: PlannedFile, crcs: Mapping[tuple[str, int], int]
) -> dict[str, tuple[PieceEntry, ...]]:
    found: defaultdict[str, list[PieceEntry]] = defaultdict(list)
    for piece in file.pieces:
        entry = PieceEntry(
            piece.offset,
            piece.length,
            piece.box.start,
            piece.box.stop,
            crcs[piece.file, piece.offset],
        )
        found[piece.name].append(entry)
    return {name: tuple(listed) for name, listed in found.items()}


def header_of(
    plan: WritePlan, file: PlannedFile, checksums: Checksums, *, id: str, step: int
) -> tuple[bytes, int]:
    """The header of a file, and its CRC-32C.

    Args:
        checksums: of all ranks that write to the file.
        id: the name of the save, as in the manifest.
    """
    pieces = _entries(file, _by_place(plan, checksums))
    header = encode_header(
        file.tensors, plan.tensors, pieces, id=id, step=step, capacity=file.header_bytes
    )
    return header, crc32c_of(header)


@dataclass(frozen=True, slots=True)
class SaveFacts:
    """The facts of a save that its manifest lists beside tensors; see `Manifest`."""

    id: str
    step: int
    created: float
    """Seconds since 1970 (Unix time)."""
    versions: Mapping[str, str]
    scalars: Mapping[str, Any]
    config: Mapping[str, Any]


def build_manifest(
    plan: WritePlan,
    checksums: Checksums,
    headers: Mapping[str, int],
    facts: SaveFacts,
    extra_files: Mapping[str, bytes],
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of a save, and its small files by name.

    Args:
        checksums: of all ranks.
        headers: the CRC-32C of each tensor file's header.
        extra_files: contents of files that the caller adds.
    Raises:
        CheckpointError: a header is missing.
    """
    crcs = _by_place(plan, checksums)
    files: dict[str, FileEntry] = {}
    for file in plan.files:
        if file.name not in headers:
            raise CheckpointError(f"no rank has written the header of {file.name}")
        files[file.name] = FileEntry(
            bytes=file.bytes,
            header_bytes=file.header_bytes,
            crc32c=headers[file.name],
            pieces=_entries(file, crcs),
        )
    small = dict(extra_files)
    whole = [file for file in plan.files if file.name.startswith("model-")]
    weights = [tensor.name for file in whole for tensor in file.tensors]
    if weights:
        small[INDEX] = huggingface_index(files, weights)
    for name, content in small.items():
        files[name] = FileEntry(bytes=len(content), crc32c=crc32c_of(content))
    manifest = Manifest(
        id=facts.id,
        step=facts.step,
        created=facts.created,
        versions=dict(facts.versions),
        scalars=dict(facts.scalars),
        config=dict(facts.config),
        tensors=dict(plan.tensors),
        files=files,
    )
    return manifest, small
