"""The inverse of the mapping: from the model's tensors to a format's, by the rules read backwards.

Pure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

from holdfast.checkpoint.convert.elements import (
    Location,
    LogicalTensor,
    SourcePiece,
    check_complete,
    moved,
)
from holdfast.checkpoint.convert.rules.mapping import View, kind_of, make_views
from holdfast.checkpoint.convert.rules.patterns import Pattern, evaluate
from holdfast.checkpoint.convert.rules.rules import Rule, RuleBook
from holdfast.checkpoint.format import TENSOR, WEIGHT
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box, without

Typed = tuple[LogicalTensor, str]
"""A tensor and its type in the output."""


@dataclass(slots=True)
class _Group:
    """The tensors of the model that make up one tensor of the format."""

    rule: Rule
    kind: str
    weight: str
    """The format's name of the weight."""
    key: str
    """The name in the format, with the addition of the kind."""
    captured: dict[str, str]
    members: dict[str, Typed] = field(default_factory=dict)
    """The members by their name in the model."""
    indices: set[tuple[int, ...]] = field(default_factory=set)
    """The indices along the stacked dimensions."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of a format: its shards, one after the other."""

    rule: Rule
    tensor: LogicalTensor
    """The tensor under the format's name, of kind "tensor"; its pieces are the model's tensors'."""
    kind: str
    """The kind of the model's tensors."""
    weight: str
    """The format's name of the weight."""
    dtype: str
    """The element type in the output."""
    groups: int
    """The number of equal parts along the fused dimension that cannot be cut."""


def map_back(
    book: RuleBook,
    tensors: Sequence[Typed],
    values: Mapping[str, int],
    where: str,
    *,
    form: str = "",
    shards: int = 1,
) -> list[Joined]:
    """Join the tensors of a model into those of a format, each whole.

    Args:
        values: the sizes of the model that the rules use, by name.
        where: the caller, for messages.
        form: the form of the format whose rules apply ("" for the usual one).
        shards: the number of parts into which `cut` will cut the tensors whose rules say so.
    Returns:
        The tensors of the format; padding has no location.
    Raises:
        CheckpointError: no rule gives a tensor, or a tensor is missing beside others, or differs
            from them in shape or type; or the format has no name for a kind.
        ConfigError: a rule needs an unknown value.
    """
    present = {tensor.name for tensor, _ in tensors}
    names = _state_names(book, tensors, where)
    found: dict[tuple[str, int, str], _Group] = {}
    rules = [(rule, _target_patterns(rule)) for rule in book.rules if rule.is_written(form)]
    values = {**values, "shards": shards}
    for tensor, out in tensors:
        for number, (rule, patterns) in enumerate(rules):
            captured = _captured(rule, patterns, tensor.name, present)
            if captured is None:
                continue
            index = tuple(int(captured.pop(name)) for name in rule.stacked)
            weight = Pattern(rule.source).fill(captured)
            key = names[tensor.kind].fill({"key": weight})
            group = _Group(rule, tensor.kind, weight, key, captured)
            group = found.setdefault((tensor.kind, number, key), group)
            group.members[tensor.name] = tensor, out
            group.indices.add(index)
            break
        else:
            raise CheckpointError(
                f"{where}: no rule of {book.format} gives {tensor.full_name} {tensor.dtype} "
                f"{list(tensor.shape)}; {book.format} has no such tensor, or its rules do not know "
                "of it"
            )
    return [_put_together(group, values, where) for group in found.values()]


def state_name(book: RuleBook, kind: str) -> Pattern | None:
    """The pattern that makes the name of a kind's tensor from the weight's name, its {key}.

    None if the format has no name for the kind, or would read that name as another kind.
    """
    if kind == WEIGHT:
        return Pattern("{key}")
    states = [(Pattern(state.source), Pattern(state.kind)) for state in book.states]
    for source, kinds in states:
        captured = kinds.match(kind)
        if captured is not None and source.captures == {"key", *captured}:
            name = Pattern(source.fill({**captured, "key": "{key}"}))
            return name if kind_of(name.fill({"key": "w"}), states)[0] == kind else None
    return None


def _state_names(book: RuleBook, tensors: Sequence[Typed], where: str) -> dict[str, Pattern]:
    """The patterns of `state_name` by kind, for all kinds of some tensors."""
    names: dict[str, Pattern] = {}
    for tensor, _ in tensors:
        name = names.get(tensor.kind) or state_name(book, tensor.kind)
        if name is None:
            raise CheckpointError(
                f"{where}: {book.format} has no name for states of the kind {tensor.kind}, such as "
                f"{tensor.full_name}"
            )
        names[tensor.kind] = name
    return names


def _target_patterns(rule: Rule) -> list[Pattern]:
    """The rule's targets, in which captures of numbers match only numbers."""
    digits = set(rule.stacked) | set(re.findall(r"\{([a-z0-9_]+):d\}", rule.source))

    def typed(found: re.Match[str]) -> str:
        return f"{{{found[1]}:d}}" if found[1] in digits else found[0]

    return [Pattern(re.sub(r"\{([a-z0-9_]+)\}", typed, target)) for target in rule.targets]


def _captured(
    rule: Rule, patterns: Sequence[Pattern], name: str, present: set[str]
) -> dict[str, str] | None:
    for pattern in patterns:
        captured = pattern.match(name)
        if captured is None:
            continue
        if not rule.if_target or Pattern(rule.if_target).fill(captured) in present:
            return captured
    return None


def _put_together(group: _Group, values: Mapping[str, int], where: str) -> Joined:
    rule, members = group.rule, group.members
    where = f"{where}, rule {rule.source}"
    first, out = next(iter(members.values()))
    for tensor, other in members.values():
        if tensor.combine != first.combine:
            raise CheckpointError(
                f"{where}: the shards of {first.full_name} combine otherwise than those of "
                f"{tensor.full_name} ({first.combine}, {tensor.combine}); convert to holdfast first"
            )
        if (tensor.dtype, other) != (first.dtype, out):
            raise CheckpointError(
                f"{where}: {first.full_name} is {first.dtype} and {tensor.full_name} is "
                f"{tensor.dtype}; they become one tensor, and must have one type"
            )
    lead = _extents(group, where)
    shape = (*lead, *_inner_shape(group, values, where))
    views = make_views(rule, group.captured, shape, values, where)
    pieces: list[SourcePiece] = []
    for view in views:
        found = members.get(view.name)
        if found is None:
            raise CheckpointError(
                f"{where}: {group.key} {list(shape)} is made of {view.name} too, which the source "
                "lacks"
            )
        tensor, _ = found
        if tensor.shape != view.shape:
            raise CheckpointError(
                f"{where}: {tensor.full_name} has shape {list(tensor.shape)}, and should have "
                f"{list(view.shape)} to be a part of {group.key} {list(shape)}"
            )
        pieces += _pieces(view, tensor, len(shape))
    if rule.strip is not None:
        held = [piece.box for piece in pieces]
        pieces += [SourcePiece(box, ()) for box in without([Box.whole(shape)], held)]
    made = LogicalTensor(group.key, TENSOR, first.dtype, shape, tuple(pieces), first.combine)
    check_complete(made)
    groups = evaluate(rule.groups, values, where) if rule.parts else 1
    return Joined(rule, made, group.kind, group.weight, out, groups)


def cut(joined: Joined, index: int, shards: int, where: str) -> LogicalTensor:
    """A shard of a tensor by its rule: a part of the tensor, or a copy.

    Raises:
        CheckpointError: the tensor cannot be cut into `shards` equal parts, or the rule has no
            shards of this form.
    """
    rule, tensor = joined.rule, joined.tensor
    if shards == 1 or rule.form == "replicated":
        return tensor
    where = f"{where}, rule {rule.source}"
    if rule.form != "shard":
        raise CheckpointError(f'{where}: a tensor that is "{rule.form}" has no {shards} shards')
    extent = tensor.shape[rule.dim]
    fused = bool(rule.parts) and rule.dim == rule.fused_dim + len(rule.stacked)
    if extent % shards or (fused and joined.groups % shards):
        groups = f", {joined.groups} groups of heads" if fused else ""
        raise CheckpointError(
            f"{where}: {tensor.name} {list(tensor.shape)} cannot be cut into {shards} equal shards "
            f"along dimension {rule.dim} ({extent} indices{groups})"
        )
    length = extent // shards
    start, stop = [0] * len(tensor.shape), list(tensor.shape)
    start[rule.dim], stop[rule.dim] = index * length, (index + 1) * length
    box = Box(tuple(start), tuple(stop))
    pieces = moved(list(tensor.within(box)), rule.dim, -index * length)
    return replace(tensor, shape=box.shape, pieces=tuple(pieces))


def _extents(group: _Group, where: str) -> tuple[int, ...]:
    """The extent of each stacked dimension."""
    lead = tuple(
        1 + max(index[d] for index in group.indices) for d in range(len(group.rule.stacked))
    )
    if len(group.indices) != prod(lead):
        missing = next(i for i in product(*map(range, lead)) if i not in group.indices)
        named = ", ".join(
            f"{name} {number}" for name, number in zip(group.rule.stacked, missing, strict=True)
        )
        raise CheckpointError(
            f"{where}: {group.key} stacks tensors that are alike, and {named} has none; a model of "
            "different layers cannot be written so"
        )
    return lead


def _inner_shape(group: _Group, values: Mapping[str, int], where: str) -> list[int]:
    """The shape without the stacked dimensions, as the first members have it."""
    rule = group.rule
    by_target: defaultdict[str, list[LogicalTensor]] = defaultdict(list)
    for target, pattern in zip(rule.targets, _target_patterns(rule), strict=True):
        for tensor, _ in group.members.values():
            if pattern.match(tensor.name) is not None:
                by_target[target].append(tensor)
    shapes = []
    for target in rule.targets:
        if not by_target[target]:
            raise CheckpointError(
                f"{where}: {group.key} is made of {target} too, which the source lacks"
            )
        shape = list(by_target[target][0].shape)
        if rule.transpose and len(shape) > 1:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        shapes.append(shape)
    inner = shapes[0]
    if rule.parts and rule.fused_dim < len(inner):
        inner[rule.fused_dim] = sum(shape[rule.fused_dim] for shape in shapes)
    if rule.strip is not None and rule.strip.dim < len(inner):
        multiple = evaluate(rule.strip.multiple, values, where)
        inner[rule.strip.dim] = -(-inner[rule.strip.dim] // multiple) * multiple
    return inner


def _pieces(view: View, tensor: LogicalTensor, rank: int) -> list[SourcePiece]:
    """The pieces of a tensor, in the coordinates of the tensor that it is a view of."""
    found = []
    for box, origin in view.boxes:
        for part in tensor.within(box):
            start, extent = list(origin), [1] * rank
            for dim, at, begin, length in zip(
                view.dims, part.box.start, box.start, part.box.shape, strict=True
            ):
                start[dim] += at - begin
                extent[dim] = length
            stop = tuple(a + n for a, n in zip(start, extent, strict=True))
            locations = []
            for location in part.locations:
                strides = [0] * rank
                for dim, stride in zip(view.dims, location.strides, strict=True):
                    strides[dim] = stride
                locations.append(Location(location.file, location.offset, tuple(strides)))
            found.append(SourcePiece(Box(tuple(start), stop), tuple(locations)))
    return found
