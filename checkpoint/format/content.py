"""The content of a checkpoint, compared by checksums, whatever files it lies in. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from holdfast import _native
from holdfast.checkpoint.format.files import Manifest, PieceEntry
from holdfast.parallel.layout import Box


def same_content(first: Manifest, second: Manifest) -> bool:
    """Whether two checkpoints have the same scalars, and the same tensors bit for bit.

    Their pieces may differ, as long as both cut a tensor along its rows. Where checksums cannot
    tell, the answer is False.
    """
    if (first.step, first.tensors, first.scalars) != (second.step, second.tensors, second.scalars):
        return False
    ours, theirs = _pieces_of(first), _pieces_of(second)
    return all(
        ours[name] == theirs[name] or _same_rows(entry.shape, ours[name], theirs[name])
        for name, entry in first.tensors.items()
    )


def same_tensor(manifest: Manifest, first: str, second: str) -> bool:
    """Whether two tensors of one type and shape are equal bit for bit; False: maybe they are not.

    Tensors that were cut in different ways can be compared only by whole rows.
    """
    ours, theirs = (
        {
            piece.box: PieceEntry(0, piece.length, piece.start, piece.stop, piece.crc32c)
            for entry in manifest.files.values()
            for piece in entry.pieces.get(name, ())
        }
        for name in (first, second)
    )
    return ours == theirs or _same_rows(manifest.tensors[first].shape, ours, theirs)


def _pieces_of(manifest: Manifest) -> Mapping[str, dict[Box, PieceEntry]]:
    """The pieces of each tensor by box, without their places in files."""
    found: defaultdict[str, dict[Box, PieceEntry]] = defaultdict(dict)
    for entry in manifest.files.values():
        for name, pieces in entry.pieces.items():
            for piece in pieces:
                placeless = PieceEntry(0, piece.length, piece.start, piece.stop, piece.crc32c)
                found[name][piece.box] = placeless
    return found


def _same_rows(
    shape: tuple[int, ...], ours: Mapping[Box, PieceEntry], theirs: Mapping[Box, PieceEntry]
) -> bool:
    known = _checksum(shape, ours.values())
    return known is not None and known == _checksum(shape, theirs.values())


def _checksum(shape: tuple[int, ...], pieces: Iterable[PieceEntry]) -> int | None:
    """CRC-32C of a whole tensor; None unless its pieces are whole rows that follow each other."""
    row, crc = 0, 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        rows = piece.stop[:1]
        if not shape or piece.box != Box((row, *[0] * (len(shape) - 1)), (*rows, *shape[1:])):
            return None
        crc = _native.crc32c_combine(crc, piece.crc32c, piece.length)
        [row] = rows
    return crc if shape and row == shape[0] else None
