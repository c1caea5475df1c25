"""The mapping by rules: from a source's tensors to the model's. Pure; needs no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from holdfast.checkpoint.convert.elements import (
    Location,
    LogicalTensor,
    SourcePiece,
    SourceTensor,
    check_complete,
    fragment_pieces,
    moved,
    overlay,
)
from holdfast.checkpoint.convert.rules.patterns import Pattern, evaluate
from holdfast.checkpoint.convert.rules.rules import Rule, RuleBook
from holdfast.checkpoint.format import ELEMENT_BYTES, WEIGHT
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.layout import Box


@dataclass(slots=True)
class Mapped:
    """The tensors of a model, and the fate of the source's tensors."""

    tensors: list[LogicalTensor]
    by_rule: Counter[str] = field(default_factory=Counter)
    """The number of source tensors that fitted each pattern."""
    left_out: dict[str, str] = field(default_factory=dict)
    """The reason for each source tensor that is left out, by key."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of the model as boxes of the tensor that its shards make up."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    """For each dimension of this tensor, the matching dimension of the other tensor."""
    boxes: tuple[tuple[Box, tuple[int, ...]], ...]
    """Each box of this tensor, with the index in the other tensor at which it begins."""


def map_tensors(
    book: RuleBook, tensors: Sequence[SourceTensor], values: Mapping[str, int], where: str
) -> Mapped:
    """Map all tensors of a source by rules.

    Args:
        values: the sizes of the model that the rules use, by name.
        where: the source's path, for messages.
    Raises:
        CheckpointError: no rule fits a tensor, a shard is missing, or shapes do not fit together.
        ConfigError: a rule needs an unknown value.
    """
    mapped = Mapped([])
    states = [(Pattern(state.source), Pattern(state.kind)) for state in book.states]
    rules = [(Pattern(rule.source), rule) for rule in book.rules]
    groups: defaultdict[tuple[str, str, int], list[SourceTensor]] = defaultdict(list)
    captured: dict[tuple[str, str, int], dict[str, str]] = {}
    skips = [(Pattern(skip.source), skip.because) for skip in book.skips]
    present = {kind_of(tensor.key, states)[1] for tensor in tensors}
    for tensor in tensors:
        reason = next((why for skip, why in skips if skip.match(tensor.key) is not None), None)
        if reason is not None:
            mapped.left_out[tensor.key] = reason
            continue
        kind, key = kind_of(tensor.key, states)
        for number, (pattern, rule) in enumerate(rules):
            found = pattern.match(key)
            if found is not None and rule.conditions:
                wanted = (Pattern(condition).fill(found) for condition in rule.conditions)
                found = found if any(name in present for name in wanted) else None
            if found is not None:
                groups[kind, key, number].append(tensor)
                captured[kind, key, number] = found
                mapped.by_rule[rule.source] += 1
                break
        else:
            raise CheckpointError(
                f"{where}: no rule of {book.format} fits {tensor.label} {tensor.dtype} "
                f"{list(tensor.shape)}; add a [[rule]] for it, or a [[skip]], in a file for --map"
            )
    for (kind, key, number), members in groups.items():
        rule = book.rules[number]
        told = f"{where}, rule {rule.source}, {members[0].label}"
        mapped.tensors += _apply(rule, kind, captured[kind, key, number], members, values, told)
    seen: set[str] = set()
    for tensor in mapped.tensors:
        if tensor.full_name in seen:
            raise CheckpointError(f"{where}: two source tensors become {tensor.full_name}")
        seen.add(tensor.full_name)
        check_complete(tensor)
    return mapped


def kind_of(key: str, states: Sequence[tuple[Pattern, Pattern]]) -> tuple[str, str]:
    """The kind of a source's tensor, and the name of its weight.

    Args:
        states: the patterns of the names of other tensors than weights, and of their kinds.
    """
    for pattern, kind in states:
        found = pattern.match(key)
        if found is not None:
            return kind.fill(found), found["key"]
    return WEIGHT, key


def _apply(
    rule: Rule,
    kind: str,
    captured: Mapping[str, str],
    members: Sequence[SourceTensor],
    values: Mapping[str, int],
    where: str,
) -> list[LogicalTensor]:
    dtypes = sorted({member.dtype for member in members})
    if len(dtypes) > 1:
        raise CheckpointError(f"{where}: its shards have dtypes {' and '.join(dtypes)}")
    shape, pieces, shards = _union(rule, members, where)
    views = make_views(rule, captured, shape, {**values, "shards": shards}, where)
    combine = rule.form if rule.form in ("sum", "mean") else "equal"
    return [
        LogicalTensor(
            view.name, kind, dtypes[0], view.shape, _lower(view, pieces, dtypes[0]), combine
        )
        for view in views
    ]


def _union(
    rule: Rule, members: Sequence[SourceTensor], where: str
) -> tuple[tuple[int, ...], list[SourcePiece], int]:
    """The tensor that shards make up: (shape, pieces, number of shards)."""
    size = ELEMENT_BYTES[members[0].dtype]
    if rule.fragments:
        members = _join_fragments(rule.fragments, members, where)
    by_index: defaultdict[int, list[SourceTensor]] = defaultdict(list)
    for member in members:
        by_index[member.index(rule.over)].append(member)
    indices = sorted(by_index)
    _check_indices(indices, rule.over, where)
    shards: list[tuple[SourceTensor, list[SourcePiece]]] = []
    for index in indices:
        first, *copies = by_index[index]
        pieces = list(first.pieces)
        for copy in copies:
            _same_shape(first, copy, where)
            pieces = overlay(pieces, copy.pieces, size)
        shards.append((first, pieces))
    first = shards[0][0]
    if rule.form == "whole" and len(shards) > 1:
        raise CheckpointError(
            f"{where}: it is cut into {len(shards)} shards along {rule.over}, and the rule says "
            "that it is "
            'whole; say `is = "shard"`, "replicated", "sum" or "mean"'
        )
    if rule.form == "shard":
        return _cut(rule.dim, shards, where)
    pieces = shards[0][1]
    for other, others in shards[1:]:
        _same_shape(first, other, where)
        pieces = overlay(pieces, others, size)
    return first.shape, pieces, len(shards)


def _same_shape(first: SourceTensor, other: SourceTensor, where: str) -> None:
    if first.shape != other.shape:
        raise CheckpointError(
            f"{where}: {first.label} has shape {list(first.shape)} and {other.label} "
            f"{list(other.shape)}; copies must be alike"
        )


def _cut(
    dim: int, shards: Sequence[tuple[SourceTensor, list[SourcePiece]]], where: str
) -> tuple[tuple[int, ...], list[SourcePiece], int]:
    first = shards[0][0]
    if dim >= len(first.shape):
        raise CheckpointError(
            f"{where}: the rule cuts dimension {dim}, and its shape is {list(first.shape)}"
        )
    position, pieces = 0, []
    for member, found in shards:
        if len(member.shape) != len(first.shape) or any(
            a != b
            for d, (a, b) in enumerate(zip(member.shape, first.shape, strict=True))
            if d != dim
        ):
            raise CheckpointError(
                f"{where}: {first.label} has shape {list(first.shape)} and {member.label} "
                f"{list(member.shape)}; shards may differ along dimension {dim} only"
            )
        pieces += moved(found, dim, position)
        position += member.shape[dim]
    shape = (*first.shape[:dim], position, *first.shape[dim + 1 :])
    return shape, pieces, len(shards)


def _check_indices(indices: Sequence[int], axis: str, where: str) -> None:
    missing = next((i for i in range(len(indices)) if indices[i] != i), None)
    if missing is not None:
        raise CheckpointError(
            f"{where}: shard {missing} along {axis} is missing; there are {list(indices)}"
        )


def _join_fragments(axis: str, members: Sequence[SourceTensor], where: str) -> list[SourceTensor]:
    """The tensors that flat fragments make up, one for each position along the other axes.

    A tensor without a position along `axis` is whole already.
    """
    groups: defaultdict[tuple[tuple[str, int], ...], list[SourceTensor]] = defaultdict(list)
    for member in members:
        groups[tuple(c for c in member.shard if c[0] != axis)].append(member)
    joined = []
    for shard, fragments in groups.items():
        if all(fragment.shard == shard for fragment in fragments):
            joined += fragments
            continue
        shape = fragments[0].full_shape
        if shape is None:
            raise CheckpointError(
                f"{where}: the source does not tell the shape of the tensor that its fragments "
                "make up"
            )
        fragments.sort(key=lambda fragment: fragment.index(axis))
        position, pieces = 0, []
        for fragment in fragments:
            pieces += fragment_pieces(fragment, position, shape)
            position += fragment.shape[0]
        first = fragments[0]
        joined.append(SourceTensor(first.key, first.dtype, shape, tuple(pieces), shard))
    return joined


def make_views(
    rule: Rule,
    captured: Mapping[str, str],
    shape: tuple[int, ...],
    values: Mapping[str, int],
    where: str,
) -> list[View]:
    """The model's tensors in a tensor of `shape`, by its rule."""
    lead = len(rule.stacked)
    if len(shape) < lead:
        raise CheckpointError(
            f"{where}: its shape {list(shape)} has no {lead} dimensions to take apart"
        )
    views = []
    for index in product(*(range(extent) for extent in shape[:lead])):
        bound = {**captured, **dict(zip(rule.stacked, map(str, index), strict=True))}
        views += _views(rule, bound, shape, index, values, where)
    return views


def _views(
    rule: Rule,
    captured: Mapping[str, str],
    shape: tuple[int, ...],
    stacked: tuple[int, ...],
    values: Mapping[str, int],
    where: str,
) -> list[View]:
    lead = len(stacked)
    inner = list(shape[lead:])
    if rule.strip is not None:
        size = evaluate(rule.strip.size, values, where)
        if rule.strip.dim >= len(inner) or inner[rule.strip.dim] < size:
            raise CheckpointError(
                f"{where}: its shape {list(shape)} has fewer than the {size} indices along "
                f"dimension {rule.strip.dim} that are left of it without padding"
            )
        inner[rule.strip.dim] = size
    dims = list(range(lead, len(shape)))
    if rule.transpose:
        if len(dims) < 2:
            raise CheckpointError(f"{where}: shape {list(shape)} cannot be transposed")
        dims[-1], dims[-2] = dims[-2], dims[-1]
    views = []
    for name, size, spans in _fused(rule, captured, inner, values, where):
        extents = list(inner)
        if rule.parts:
            extents[rule.fused_dim] = size
        boxes = []
        for at, start, length in spans:
            begin, end = [0] * len(inner), list(extents)
            origin = [0] * len(inner)
            if rule.parts:
                begin[rule.fused_dim], end[rule.fused_dim] = at, at + length
                origin[rule.fused_dim] = start
            turned = [d - lead for d in dims]
            box = Box(tuple(begin[d] for d in turned), tuple(end[d] for d in turned))
            boxes.append((box, (*stacked, *origin)))
        full = tuple(extents[d - lead] for d in dims)
        views.append(View(name, full, tuple(dims), tuple(boxes)))
    return views


def _fused(
    rule: Rule,
    captured: Mapping[str, str],
    inner: Sequence[int],
    values: Mapping[str, int],
    where: str,
) -> list[tuple[str, int, list[tuple[int, int, int]]]]:
    """By target: its size along the fused dimension, and spans (index there, in the source,
    length).
    """
    if not rule.parts:
        return [(Pattern(rule.target).fill(captured), 0, [(0, 0, 0)])]
    groups = evaluate(rule.groups, values, where)
    sizes = [evaluate(part.size, values, where) for part in rule.parts]
    total = inner[rule.fused_dim] if rule.fused_dim < len(inner) else -1
    if groups < 1 or min(sizes) < 0 or groups * sum(sizes) != total:
        shown = " + ".join(map(str, sizes))
        raise ConfigError(
            f"{where}: the parts make {groups} x ({shown}) = {groups * sum(sizes)} indices along "
            f"dimension {rule.fused_dim}, and its shape there is {list(inner)}"
        )
    spans: dict[str, list[tuple[int, int, int]]] = {target: [] for target in rule.targets}
    lengths: Counter[str] = Counter()
    before = 0
    for part, size in zip(rule.parts, sizes, strict=True):
        for group in range(groups):
            start = group * sum(sizes) + before
            spans[part.target].append((lengths[part.target], start, size))
            lengths[part.target] += size
        before += size
    return [
        (Pattern(target).fill(captured), lengths[target], spans[target]) for target in rule.targets
    ]


def _lower(view: View, pieces: Sequence[SourcePiece], dtype: str) -> tuple[SourcePiece, ...]:
    """The pieces of a view, from those of the tensor that it is a view of."""
    size = ELEMENT_BYTES[dtype]
    found = []
    for box, origin in view.boxes:
        if box.start and not box.elements:
            continue
        extent = [1] * len(origin)
        for dim, length in zip(view.dims, box.shape, strict=True):
            extent[dim] = length
        wanted = Box(origin, tuple(a + b for a, b in zip(origin, extent, strict=True)))
        for piece in pieces:
            common = piece.box if not wanted.start else piece.box.intersect(wanted)
            if common is None:
                continue
            part = piece.part(common, size)
            start = tuple(
                b + common.start[d] - origin[d] for b, d in zip(box.start, view.dims, strict=True)
            )
            stop = tuple(a + common.shape[d] for a, d in zip(start, view.dims, strict=True))
            locations = tuple(
                Location(
                    location.file, location.offset, tuple(location.strides[d] for d in view.dims)
                )
                for location in part.locations
            )
            found.append(SourcePiece(Box(start, stop), locations))
    return tuple(found)
