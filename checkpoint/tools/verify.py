"""Verification: every byte against its checksum, every file against the manifest."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holdfast import _native
from holdfast.checkpoint.format import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    PARTIAL,
    FileEntry,
    FileHeader,
    Manifest,
    TensorEntry,
    crc32c_of,
    decode_header,
    decode_index,
    encode_manifest,
    read_header,
    step_of,
)
from holdfast.checkpoint.loading import (
    ByteReader,
    PieceRead,
    check_coverage,
    fits,
    requests_of,
)
from holdfast.checkpoint.stores import PathOrUrl, checkpoint_at, sync, write_synced
from holdfast.parallel.errors import CheckpointError, Unreadable, printable
from holdfast.parallel.reading import read_regular

_READ_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    file: str
    message: str
    tensor: str = ""
    box: str = ""
    is_unread: bool = False
    """It cannot be read: whether it is damaged is not known."""

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.message}")


def check_small_parts(manifest: Manifest, reader: ByteReader, files: Iterable[str]) -> None:
    """Check headers of tensor files, and other files as a whole, against the manifest.

    Raises:
        CheckpointError: a file is missing, belongs to another checkpoint, or is damaged.
    """
    for name in files:
        problem = _small_part_problem(manifest, reader, name)
        if problem is not None:
            raise CheckpointError(str(problem))


def _small_part_problem(manifest: Manifest, reader: ByteReader, name: str) -> Problem | None:
    entry = manifest.files[name]
    try:
        size = reader.size(name)
        if size != entry.bytes:
            return Problem(name, f"has {size} bytes where the manifest says {entry.bytes}")
        content = reader.read_file(name, entry.header_bytes or None)
    except CheckpointError as error:
        return _unread(name, error)
    wanted = entry.header_bytes or entry.bytes
    if len(content) != wanted:
        return Problem(name, f"has {len(content)} bytes where the manifest says {wanted}")
    if crc32c_of(content) != entry.crc32c:
        what = "its header" if entry.header_bytes else "it"
        return Problem(
            name, f"{what} is damaged or of another checkpoint{_foreign(content, manifest)}"
        )
    return None


def _unread(name: str, error: CheckpointError) -> Problem:
    is_unread = isinstance(error, Unreadable)
    return Problem(name, f"is missing or cannot be read: {error}", is_unread=is_unread)


def _foreign(header: bytes, manifest: Manifest) -> str:
    """The text about a header of another checkpoint; empty where it does not help."""
    try:
        found = decode_header(header, "")
    except CheckpointError:
        return ""
    if found.id == manifest.id:
        return ""
    return f": it belongs to step {found.step}, save {found.id[:8]}"


def verify_checkpoint(
    place: PathOrUrl, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Problem]:
    """All problems of the checkpoint at a path or URL; every byte is read. Local.

    Args:
        progress: called with (bytes read, bytes in all).
    Raises:
        Unreadable: there is no checkpoint, or its manifest cannot be read.
        CheckpointError: the manifest is damaged.
    """
    checkpoint = checkpoint_at(place)
    manifest = checkpoint.manifest()
    problems: list[Problem] = []
    try:
        check_coverage(manifest, MANIFEST)
    except CheckpointError as error:
        problems.append(Problem(MANIFEST, str(error)))
    present = checkpoint.files()
    strangers = sorted(present.keys() - manifest.files.keys() - {MANIFEST})
    problems += [Problem(name, "is not part of this checkpoint") for name in strangers]
    reader = checkpoint.reader()
    done, total = 0, manifest.bytes
    try:
        for name, entry in manifest.files.items():
            found = list(_file_problems(manifest, reader, name, entry, present.get(name)))
            problems += found
            done += entry.bytes
            progress(done, total)
    finally:
        reader.close()
    return problems


def _file_problems(
    manifest: Manifest, reader: ByteReader, name: str, entry: FileEntry, size: int | None
) -> Iterator[Problem]:
    if size is None:
        yield Problem(name, "is missing")
        return
    small = _small_part_problem(manifest, reader, name)
    if small is not None:
        yield small
        if small.is_unread:
            return
    try:
        for read, crc in checksums_of(manifest, reader, name, limit=size):
            if crc != read.piece.crc32c:
                yield Problem(
                    name,
                    f"{read.name}{read.piece.box} at byte {read.piece.offset} is damaged: "
                    f"checksum {crc:08x}, not {read.piece.crc32c:08x}",
                    read.name,
                    str(read.piece.box),
                )
    except CheckpointError as error:
        yield _unread(name, error)


def checksums_of(
    manifest: Manifest, reader: ByteReader, file: str, *, limit: int
) -> Iterator[tuple[PieceRead, int]]:
    """Read the pieces that fit into a file's first `limit` bytes; yield each with its CRC-32C."""
    entry = manifest.files[file]
    reads = [
        PieceRead(name, manifest.tensors[name].dtype, file, piece, ())
        for name, pieces in entry.pieces.items()
        if name in manifest.tensors
        for piece in pieces
        if piece.offset + piece.length <= limit and fits(piece, manifest.tensors[name], entry)
    ]
    reads.sort(key=lambda read: read.piece.offset)
    for load in _batches(reads):
        requests, places, end = requests_of(load)
        memory = np.empty(end + 4096, np.uint8)
        memory = memory[-memory.ctypes.data % 4096 :]
        for _ in reader.read(requests, memory.ctypes.data):
            pass
        for read, place in zip(load, places, strict=True):
            yield read, _native.crc32c(memory.ctypes.data + place, read.piece.length)


def _batches(reads: list[PieceRead]) -> Iterator[list[PieceRead]]:
    batch: list[PieceRead] = []
    size = 0
    for read in reads:
        if batch and size + read.piece.length > _READ_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(read)
        size += read.piece.length
    if batch:
        yield batch


def checkpoint_to_rebuild(place: Path) -> tuple[Path, bool]:
    """(The folder whose manifest is to be made anew, whether it is whole.) Local.

    Of a run, or a folder of checkpoints, it is the newest one without a whole manifest; the newest
    of all if there is none such.
    """
    if any(place.glob("*.safetensors")):
        return place, _has_manifest(place)
    steps = {
        (step, path)
        for folder in (place, place / "checkpoints")
        for path in folder.glob("step-*")
        if (step := step_of(path.name)) is not None
    }
    found = [(path, _has_manifest(path)) for _, path in sorted(steps, reverse=True)]
    return next((pair for pair in found if not pair[1]), found[0] if found else (place, False))


def _has_manifest(folder: Path) -> bool:
    try:
        checkpoint_at(folder).manifest()
    except CheckpointError:
        return False
    return True


def rebuild_manifest(folder: Path) -> Manifest:
    """Make a manifest from the headers of the tensor files, and write it. Local.

    Weights and optimizer state are all restored. The configuration and the scalars other than the
    step are lost with the old manifest. Checksums come from the headers, so later damage is still
    found.

    Raises:
        CheckpointError: the files do not make up a checkpoint: a tensor is incomplete, or they are
            of different saves.
    """
    headers: dict[str, tuple[FileHeader, FileEntry]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        size, content = read_header(path)
        header = decode_header(content, str(path))
        if header.format_version != FORMAT_VERSION:
            raise Unreadable(f"{path} has format version {header.format_version}")
        entry = FileEntry(
            bytes=size, header_bytes=len(content), crc32c=crc32c_of(content), pieces=header.pieces
        )
        headers[path.name] = header, entry
    if not headers:
        raise Unreadable(f"{folder} holds no tensor file of a checkpoint")
    saves = {(header.id, header.step) for header, _ in headers.values()}
    if len(saves) > 1:
        listed = ", ".join(f"step {step} ({id[:8]})" for id, step in sorted(saves))
        raise CheckpointError(f"the tensor files of {folder} are of different saves: {listed}")
    [(id, step)] = saves
    tensors: dict[str, TensorEntry] = {}
    for header, _ in headers.values():
        tensors |= header.tensors
    files = {name: entry for name, (_, entry) in headers.items()}
    for path in sorted(folder.iterdir()):
        is_part = path.name not in files and path.name != MANIFEST and path.suffix != PARTIAL
        if is_part and path.is_file():
            content = _small_file(path)
            files[path.name] = FileEntry(bytes=len(content), crc32c=crc32c_of(content))
    manifest = Manifest(
        id=id or uuid.uuid4().hex,
        step=step,
        created=time.time(),
        scalars={"step": step, "rebuilt": True},
        tensors=tensors,
        files=files,
    )
    check_coverage(manifest, str(folder))
    _check_index(folder, files)
    partial = folder / (MANIFEST + PARTIAL)
    write_synced(partial, encode_manifest(manifest))
    partial.replace(folder / MANIFEST)
    sync(folder)
    return manifest


def _small_file(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error


def _check_index(folder: Path, files: dict[str, FileEntry]) -> None:
    """Raise CheckpointError if the index of weights names a file that is missing."""
    path = folder / INDEX
    if not path.exists():
        return
    named = set(decode_index(_small_file(path), str(path)).values())
    missing = sorted(named - files.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks {missing[0]}, which {INDEX} names")
