"""The write plan: which rank writes which pieces to which file. Pure; needs no torch.

It is a function of tensors, holders and nodes, equal on every rank, computed without communication,
and kept while the layout stands. Weights are written whole, under the names that Hugging Face
loaders read, each file by one node. Other state is written in boxes, each by a rank that holds it.
No byte is written twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from holdfast.checkpoint.format import (
    ELEMENT_BYTES,
    FileTensor,
    HeldBox,
    PieceEntry,
    PlannedFile,
    PlannedPiece,
    SavedTensor,
    TensorEntry,
    WritePlan,
    base_name,
    header_capacity,
    key_of,
)
from holdfast.parallel.errors import LayoutError
from holdfast.parallel.layout import Box, without
from holdfast.parallel.plan import assign_owners

SMALLEST_PIECE_BYTES = 8 << 20
MOST_PIECES = 1 << 18
LARGEST_FILE_BYTES = 4 << 30


def piece_bytes_for(total: int) -> int:
    """The largest piece in bytes: 8 MiB, doubled until 2^18 pieces make the checkpoint."""
    size = SMALLEST_PIECE_BYTES
    while total > size * MOST_PIECES:
        size *= 2
    return size


def make_write_plan(tensors: Sequence[SavedTensor], nodes: Sequence[int]) -> WritePlan:
    """Plan a checkpoint. Pure.

    Args:
        tensors: the tensors in the order in which files list them.
        nodes: the node of each rank.
    Raises:
        LayoutError: parts leave a hole, overlap or lie outside their tensor, or two tensors have
            one name.
    """
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors):
        raise LayoutError("a tensor is listed twice; list its parts under one name")
    for tensor in tensors:
        _check_parts(tensor)
    total = sum(tensor.entry.bytes for tensor in tensors)
    size = piece_bytes_for(total)
    entries = {tensor.name: tensor.entry for tensor in tensors}
    whole = [tensor for tensor in tensors if tensor.whole]
    boxed = [tensor for tensor in tensors if not tensor.whole]
    files = [*_weight_files(whole, entries, nodes, size), *_box_files(boxed, entries, size)]
    return WritePlan(entries, tuple(files), size)


def _check_parts(tensor: SavedTensor) -> None:
    whole = Box.whole(tensor.shape)
    for part in tensor.parts:
        if len(part.box.start) != len(tensor.shape) or not whole.contains(part.box):
            raise LayoutError(f"{tensor.name}: box {part.box} lies outside {list(tensor.shape)}")
        if not part.holders:
            raise LayoutError(f"{tensor.name}: no rank holds box {part.box}")
    held = sum(part.box.elements for part in tensor.parts)
    holes = without([whole], sorted((p.box for p in tensor.parts), key=lambda box: box.start))
    if holes:
        raise LayoutError(f"{tensor.name}: no rank holds {holes[0]} of {list(tensor.shape)}")
    if held != whole.elements:
        raise LayoutError(f"{tensor.name}: its parts overlap; each element must be in one part")


def _is_rows(box: Box, shape: Sequence[int]) -> bool:
    """Whether a box is whole rows, hence contiguous in the tensor."""
    return all(a == 0 for a in box.start[1:]) and box.stop[1:] == tuple(shape[1:])


def _row_boxes(box: Box, row_bytes: int, piece_bytes: int) -> Iterator[Box]:
    """Cut a box along dimension 0 into boxes of at most `piece_bytes`, or one row."""
    if not box.start or not box.elements:
        yield box
        return
    rows = max(1, piece_bytes // max(1, row_bytes))
    for start in range(box.start[0], box.stop[0], rows):
        stop = min(box.stop[0], start + rows)
        yield Box((start, *box.start[1:]), (stop, *box.stop[1:]))


def _merged(parts: Sequence[HeldBox]) -> list[HeldBox]:
    """The parts, with neighbouring rows of the same holders merged."""
    merged: list[HeldBox] = []
    for part in sorted(parts, key=lambda p: (p.box.start[1:], p.box.start[:1])):
        last = merged[-1] if merged else None
        if (
            last is not None
            and part.box.start
            and (last.holders, last.apart) == (part.holders, part.apart)
            and last.box.stop[0] == part.box.start[0]
            and last.box.start[1:] == part.box.start[1:]
            and last.box.stop[1:] == part.box.stop[1:]
        ):
            merged[-1] = replace(last, box=Box(last.box.start, part.box.stop))
        else:
            merged.append(part)
    return merged


_Groups = tuple[tuple[int, ...], ...]
"""Ways to provide a piece; each is the ranks that hold its parts, one rank a part."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A piece before its file and writer are known."""

    tensor: SavedTensor
    box: Box
    parts: tuple[Box, ...]
    """The part that each rank of a group has: the box itself, or columns of it."""
    groups: _Groups

    @property
    def bytes(self) -> int:
        return self.tensor.nbytes(self.box)

    def sources(self, group: tuple[int, ...]) -> tuple[HeldBox, ...]:
        """The sources of the bytes for a writer that must ask other ranks."""
        if len(group) == 1:
            return ()
        return tuple(HeldBox(box, (rank,)) for box, rank in zip(self.parts, group, strict=True))


def _drafts(tensor: SavedTensor, piece_bytes: int) -> list[_Draft]:
    merged = _merged(tensor.parts)
    if not all(_is_rows(part.box, tensor.shape) for part in merged):
        return _joined_drafts(tensor, merged, piece_bytes)
    return _own_drafts(tensor, merged, piece_bytes)


def _own_drafts(tensor: SavedTensor, merged: Sequence[HeldBox], piece_bytes: int) -> list[_Draft]:
    """Drafts of pieces that one rank has whole."""
    drafts = []
    for part in merged:
        row_bytes = prod(part.box.shape[1:]) * ELEMENT_BYTES[tensor.dtype]
        groups = tuple((rank,) for rank in part.holders)
        for box in _row_boxes(part.box, row_bytes, piece_bytes):
            drafts.append(_Draft(tensor, box, (box,), groups))  # noqa: PERF401
    return drafts


def _joined_drafts(
    tensor: SavedTensor, merged: Sequence[HeldBox], piece_bytes: int
) -> list[_Draft]:
    """Drafts of whole rows of a tensor split along columns, joined from one rank for each part."""
    row_bytes = prod(tensor.shape[1:]) * ELEMENT_BYTES[tensor.dtype]
    drafts = []
    for box in _row_boxes(Box.whole(tensor.shape), row_bytes, piece_bytes):
        inside = [
            (common, part.holders)
            for part in merged
            if (common := part.box.intersect(box)) is not None
        ]
        groups = tuple(zip(*(holders for _, holders in inside), strict=False))
        drafts.append(_Draft(tensor, box, tuple(common for common, _ in inside), groups))
    return drafts


def _weight_files(
    tensors: Sequence[SavedTensor],
    entries: Mapping[str, TensorEntry],
    nodes: Sequence[int],
    piece_bytes: int,
) -> list[PlannedFile]:
    drafts = {tensor.name: _drafts(tensor, piece_bytes) for tensor in tensors}
    writing = _writing_nodes(tensors, drafts, nodes)
    contents: list[list[SavedTensor]] = []
    for node in sorted(set(writing.values())):
        size = LARGEST_FILE_BYTES + 1  # so that the first tensor begins a file, even if it is empty
        for tensor in tensors:
            if writing[tensor.name] != node:
                continue
            if size + tensor.entry.bytes > LARGEST_FILE_BYTES:
                contents.append([])
                size = 0
            contents[-1].append(tensor)
            size += tensor.entry.bytes
    flat = [draft for content in contents for tensor in content for draft in drafts[tensor.name]]
    near = _Nearby(nodes)
    usable = [near.groups(draft.groups, writing[draft.tensor.name]) for draft in flat]
    # Leads stand for their groups, so that drafts with the same candidates spread evenly.
    chosen = assign_owners([p.bytes for p in flat], [found.leads for found in usable])
    placed: defaultdict[str, list[_Placed]] = defaultdict(list)
    for number, (draft, found, lead) in enumerate(zip(flat, usable, chosen, strict=True)):
        group = found.by_lead[lead]
        # Where a box is joined, the members of the group write in turn.
        writer = group[number % len(group)]
        placed[draft.tensor.name].append(_Placed(draft, writer, draft.sources(group)))
    return [
        _file(
            f"model-{number + 1:05d}-of-{len(contents):05d}.safetensors",
            [item for tensor in content for item in placed[tensor.name]],
            entries,
            merge=True,
        )
        for number, content in enumerate(contents)
    ]


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The groups that may provide a piece, by their first rank."""

    leads: tuple[int, ...]
    by_lead: Mapping[int, tuple[int, ...]]


class _Nearby:
    """The groups of ranks that lie on one node, looked up once for each set of groups."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = nodes
        self._complete: dict[_Groups, frozenset[int]] = {}
        self._groups: dict[tuple[_Groups, int], _Candidates] = {}

    def complete(self, groups: _Groups) -> frozenset[int]:
        """The nodes that have all of a piece."""
        if groups not in self._complete:
            found = ({self._nodes[rank] for rank in group} for group in groups)
            self._complete[groups] = frozenset(n for here in found if len(here) == 1 for n in here)
        return self._complete[groups]

    def groups(self, groups: _Groups, node: int) -> _Candidates:
        """The groups on a node; all groups where it has none."""
        key = groups, node
        if key not in self._groups:
            there = [g for g in groups if all(self._nodes[rank] == node for rank in g)]
            by_lead = {group[0]: group for group in there or groups}
            self._groups[key] = _Candidates(tuple(sorted(by_lead)), by_lead)
        return self._groups[key]


def _writing_nodes(
    tensors: Sequence[SavedTensor], drafts: Mapping[str, Sequence[_Draft]], nodes: Sequence[int]
) -> dict[str, int]:
    """The node that writes each tensor: the least loaded of the nodes that have all of it."""
    near = _Nearby(nodes)
    loads: defaultdict[int, int] = defaultdict(int)
    writing: dict[str, int] = {}
    for tensor in sorted(tensors, key=lambda t: (-t.entry.bytes, t.name)):
        ways = {draft.groups for draft in drafts[tensor.name]}
        able = frozenset.intersection(*(near.complete(groups) for groups in ways))
        # Where no node has all of a tensor, several nodes write the file.
        candidates = able or {nodes[group[0]] for groups in ways for group in groups}
        chosen = min(candidates, key=lambda node: (loads[node], node))
        loads[chosen] += tensor.entry.bytes
        writing[tensor.name] = chosen
    return writing


def _box_files(
    tensors: Sequence[SavedTensor], entries: Mapping[str, TensorEntry], piece_bytes: int
) -> list[PlannedFile]:
    drafts = [
        draft
        for tensor in tensors
        for draft in _own_drafts(tensor, _merged(tensor.parts), piece_bytes)
    ]
    writers = assign_owners(
        [draft.bytes for draft in drafts],
        [tuple(sorted(group[0] for group in draft.groups)) for draft in drafts],
    )
    by_writer: defaultdict[int, list[_Placed]] = defaultdict(list)
    for draft, writer in zip(drafts, writers, strict=True):
        by_writer[writer].append(_Placed(draft, writer, ()))
    return [
        _file(
            f"optimizer-{number + 1:05d}-of-{len(by_writer):05d}.safetensors",
            _by_rows(by_writer[writer]),
            entries,
            merge=False,
        )
        for number, writer in enumerate(sorted(by_writer))
    ]


def _by_rows(placed: Sequence[_Placed]) -> list[_Placed]:
    """The pieces ordered so that all state of the same rows is together: one fence frees it all."""
    rank: dict[tuple[str, Box], int] = {}
    for item in placed:
        rank.setdefault((_base(item.draft.tensor), item.draft.box), len(rank))
    return sorted(placed, key=lambda item: rank[_base(item.draft.tensor), item.draft.box])


def _base(tensor: SavedTensor) -> str:
    return base_name(tensor.kind, tensor.name)


@dataclass(frozen=True, slots=True)
class _Placed:
    draft: _Draft
    writer: int
    sources: tuple[HeldBox, ...]


def _file(
    name: str, placed: Sequence[_Placed], entries: Mapping[str, TensorEntry], *, merge: bool
) -> PlannedFile:
    """Place drafts one after the other; with `merge`, the drafts of a tensor become one tensor."""
    tensors: list[FileTensor] = []
    spans: list[tuple[_Placed, int]] = []
    position = 0
    for item in placed:
        tensor, box, length = item.draft.tensor, item.draft.box, item.draft.bytes
        spans.append((item, position))
        if merge and tensors and tensors[-1].name == tensor.name:
            tensors[-1] = FileTensor(
                tensor.name,
                tensor.name,
                Box.whole(tensor.shape),
                tensors[-1].begin,
                position + length,
            )
        else:
            listed = Box.whole(tensor.shape) if merge else box
            key = key_of(tensor.name, listed, tensor.shape)
            tensors.append(FileTensor(key, tensor.name, listed, position, position + length))
        position += length
    trial: defaultdict[str, list[PieceEntry]] = defaultdict(list)
    for item, offset in spans:
        box = item.draft.box
        trial[item.draft.tensor.name].append(
            PieceEntry(offset, item.draft.bytes, box.start, box.stop, 0)
        )
    header = header_capacity(tensors, entries, trial)
    pieces = tuple(
        PlannedPiece(
            item.draft.tensor.name,
            item.draft.box,
            name,
            header + offset,
            item.draft.bytes,
            item.writer,
            item.sources,
        )
        for item, offset in spans
    )
    return PlannedFile(name, tuple(tensors), pieces, header, header + position)
