"""Checkpoints in this project's own format."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from holdfast.checkpoint.convert.elements import (
    Location,
    LogicalTensor,
    Output,
    SourcePiece,
    Unit,
    check_complete,
    row_major,
)
from holdfast.checkpoint.convert.sources import (
    Catalog,
    ReadOptions,
    WriteOptions,
    choose_output_dtypes,
    files_for,
    given_files,
)
from holdfast.checkpoint.format import (
    BUFFER,
    INDEX,
    MANIFEST,
    WEIGHT,
    HeldBox,
    Manifest,
    SavedTensor,
    SaveFacts,
    WritePlan,
    base_name,
    build_manifest,
    encode_manifest,
    header_of,
)
from holdfast.checkpoint.loading import check_coverage
from holdfast.checkpoint.saving import LARGEST_FILE_BYTES, make_write_plan
from holdfast.checkpoint.stores import find_checkpoint, open_written, write_synced
from holdfast.checkpoint.tools import check_small_parts
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import Box

NAME = "holdfast"


def read(path: Path, options: ReadOptions) -> Catalog:
    """Read the tensors of a checkpoint, with the checksums of its pieces.

    Raises:
        CheckpointError: there is no checkpoint, or its manifest, a header or a small file is
            damaged.
    """
    if options.rules is not None:
        raise ConfigError("--map is for foreign formats; the tensors of holdfast have their names")
    found = find_checkpoint(path)
    folder, manifest = Path(found.place), found.manifest()
    check_coverage(manifest, found.place)
    reader = found.reader()
    try:
        check_small_parts(manifest, reader, manifest.files)
        files = {
            name: reader.read_file(name)
            for name, entry in manifest.files.items()
            if not entry.header_bytes and name != INDEX
        }
    finally:
        reader.close()
    catalog = Catalog(
        NAME,
        folder,
        _tensors(manifest),
        step=manifest.step,
        scalars=dict(manifest.scalars),
        config=dict(manifest.config),
        files=files | given_files(options),
    )
    for file, entry in manifest.files.items():
        for stored in entry.pieces.values():
            for piece in stored:
                catalog.checks[file, piece.offset, piece.length] = piece.crc32c
    return catalog


def _tensors(manifest: Manifest) -> list[LogicalTensor]:
    pieces: defaultdict[str, list[SourcePiece]] = defaultdict(list)
    for file, entry in manifest.files.items():
        for name, stored in entry.pieces.items():
            for piece in stored:
                location = Location(file, piece.offset, row_major(piece.box.shape))
                pieces[name].append(SourcePiece(piece.box, (location,)))
    tensors = []
    for name, entry in manifest.tensors.items():
        base = base_name(entry.kind, name)
        tensor = LogicalTensor(base, entry.kind, entry.dtype, entry.shape, tuple(pieces[name]))
        check_complete(tensor)
        tensors.append(tensor)
    return tensors


def plan(catalog: Catalog, options: WriteOptions) -> Output:
    """Plan a checkpoint with everything that the source has."""
    typed = choose_output_dtypes(catalog, options.dtype, masters=True)
    total = sum(tensor.bytes for tensor, _ in typed)
    writers = tuple(range(max(1, -(-total // LARGEST_FILE_BYTES))))
    saved = [
        SavedTensor(
            tensor.full_name,
            tensor.kind,
            out,
            tensor.shape,
            (HeldBox(Box.whole(tensor.shape), writers),),
            whole=tensor.kind in (WEIGHT, BUFFER),
        )
        for tensor, out in typed
    ]
    layout = make_write_plan(saved, [0] * len(writers))
    files = files_for(catalog, typed)
    for name in [name for name in files if "/" in name]:
        del files[name]
        catalog.left_out[name] = f"{NAME} has no folders"
    by_name = {tensor.full_name: tensor for tensor, _ in typed}
    planned = [piece for file in layout.files for piece in file.pieces]
    units = [
        Unit(by_name[c.name], c.box, layout.tensors[c.name].dtype, c.file, c.offset)
        for c in planned
        if c.length
    ]

    def finish(folder: Path, checksums: Sequence[int]) -> None:
        made = iter(checksums)
        crcs = {(c.file, c.offset, c.name): next(made) if c.length else 0 for c in planned}
        by_rank = {
            rank: [crcs[c.file, c.offset, c.name] for c in layout.written_by(rank)]
            for rank in writers
        }
        _write_metadata(folder, layout, by_rank, catalog, files)

    return Output({file.name: file.bytes for file in layout.files}, units, finish, typed)


def _write_metadata(
    folder: Path,
    layout: WritePlan,
    checksums: dict[int, list[int]],
    catalog: Catalog,
    extra_files: dict[str, bytes],
) -> None:
    """Write the headers, small files and manifest of a checkpoint after its tensors.

    Args:
        checksums: by rank, the checksums of the pieces that it wrote, in their order.
    """
    id = uuid.uuid4().hex
    headers: dict[str, int] = {}
    for file in layout.files:
        content, headers[file.name] = header_of(layout, file, checksums, id=id, step=catalog.step)
        with open_written(folder / file.name) as opened:
            opened.write(content)
    facts = SaveFacts(
        id=id,
        step=catalog.step,
        created=time.time(),
        versions={"holdfast": version("holdfast"), "torch": version("torch")},
        scalars={"step": catalog.step, **catalog.scalars},
        config=catalog.config,
    )
    manifest, small = build_manifest(layout, checksums, headers, facts, extra_files)
    for name, content in small.items():
        write_synced(folder / name, content)
    write_synced(folder / MANIFEST, encode_manifest(manifest))
