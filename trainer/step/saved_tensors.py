"""The saved tensors of a run: every tensor by logical name, and the boxes that each rank has.

Pure; needs no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from holdfast.checkpoint.format import WEIGHT, HeldBox, Manifest, SavedTensor, full_name
from holdfast.parallel.layout import Box
from holdfast.parallel.optimizer import StateFormat, rule_of
from holdfast.parallel.plan import Plan, block_box, keepers, shards
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig

T = TypeVar("T")
_Ranks = dict[int, None]
"""A set of ranks in the order in which they were added."""
_Holders = defaultdict[str, dict[Box, _Ranks]]


def state_format(config: RunConfig) -> StateFormat:
    """The optimizer state that a run keeps. Pure."""
    optimizer = config.optimizer
    precision = PRECISIONS[config.train.precision]
    moments = None if optimizer.moments_dtype == "auto" else PRECISIONS[optimizer.moments_dtype]
    return StateFormat(rule_of(optimizer), precision, optimizer.state == "host", moments)


def saved_tensors(
    plan: Plan, form: StateFormat, *, from_shadows: bool = False
) -> list[SavedTensor]:
    """Every logical tensor of a run, and the holders of its boxes. Pure; equal on every rank.

    Args:
        from_shadows: take weights, too, from each block's first shadow if it has one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    holders, savers = _Holders(dict), _Holders(dict)
    parts: defaultdict[str, dict[Box, int]] = defaultdict(dict)
    rows: defaultdict[str, dict[Box, int]] = defaultdict(dict)
    owners: defaultdict[str, dict[Box, int]] = defaultdict(dict)
    for index, blocks in enumerate(plan.blocks):
        for block, owner in zip(blocks, plan.owners[index], strict=True):
            spec = plan.spec_of(block)
            box = block_box(spec, block)
            shapes[spec.name] = spec.shape
            keeping = keepers(plan, block, "parameters")
            holders[spec.name].setdefault(box, {}).update(dict.fromkeys(keeping))
            shadows = plan.shadows[index][block.index] if from_shadows and plan.shadows else ()
            savers[spec.name].setdefault(box, {})[shadows[0] if shadows else owner] = None
            parts[spec.name][box], owners[spec.name][box] = index, owner
            rows[spec.name][box] = block.spec_index
    kept = {
        name: _parts(savers[name], parts[name], rows[name], owners[name] if from_shadows else {})
        for name in shapes
    }
    weights = [
        SavedTensor(
            name,
            WEIGHT,
            form.precision.stored,
            shape,
            kept[name] if from_shadows else _parts(holders[name], parts[name], rows[name]),
            whole=True,
        )
        for name, shape in shapes.items()
    ]
    state = [
        SavedTensor(
            full_name(kind, name),
            kind,
            form.precision_of(kind).stored,
            shape,
            kept[name],
            whole=False,
        )
        for name, shape in shapes.items()
        for kind in form.saved
    ]
    return weights + state


def renumbered(tensors: Sequence[SavedTensor], ranks: Sequence[int]) -> list[SavedTensor]:
    """The same tensors, with positions in `ranks` instead of ranks. Pure."""
    if list(ranks) == list(range(len(ranks))):
        return list(tensors)
    places = {rank: place for place, rank in enumerate(ranks)}
    return [
        replace(
            tensor,
            parts=tuple(
                replace(part, holders=tuple(places[rank] for rank in part.holders))
                for part in tensor.parts
            ),
        )
        for tensor in tensors
    ]


def _parts(boxes: Mapping[Box, _Ranks], *apart: Mapping[Box, int]) -> tuple[HeldBox, ...]:
    """The boxes with their ranks in the order of the replicas, by which columns are joined.

    Args:
        apart: neighbours that differ in one of these lie apart in memory.
    """
    return tuple(
        HeldBox(box, tuple(ranks), tuple(found[box] for found in apart if box in found))
        for box, ranks in boxes.items()
    )


def wanted_boxes(plan: Plan, rank: int, form: StateFormat) -> dict[str, tuple[Box, ...]]:
    """The boxes of every saved tensor that a rank needs to resume. Pure."""
    found: defaultdict[str, list[Box]] = defaultdict(list)
    for name, box in _kept_weights(plan, rank):
        if box not in found[name]:
            found[name].append(box)
    for key in plan.owned_blocks(rank):
        block = plan.block(key)
        spec = plan.spec_of(block)
        if plan.is_guest(key):
            found[spec.name].append(block_box(spec, block))
        for kind in form.saved:
            _join(found[full_name(kind, spec.name)], block_box(spec, block))
    return {name: tuple(boxes) for name, boxes in found.items()}


def _kept_weights(plan: Plan, rank: int) -> Iterator[tuple[str, Box]]:
    """The weights that a rank keeps: whole segments, or the blocks of its share."""
    for layer in plan.layers_at(rank):
        for _, part, row, spec in plan.rows_of(rank, layer):
            if not shards(plan, "parameters"):
                yield spec.name, spec.box
                continue
            for block in plan.blocks_of(layer, part, row):
                if rank in keepers(plan, block, "parameters", layer):
                    yield spec.name, block_box(spec, block)


def _join(boxes: list[Box], box: Box) -> None:
    """Append rows, joined to the last box if they follow it."""
    last = boxes[-1] if boxes else None
    if last is not None and last.stop[0] == box.start[0] and last.start[1:] == box.start[1:]:
        boxes[-1] = Box(last.start, box.stop)
    else:
        boxes.append(box)


def weights_only(found: Mapping[str, T], manifest: Manifest, form: StateFormat) -> dict[str, T]:
    """The part of a rank's state that a checkpoint without optimizer state has. Pure."""
    return {
        name: value
        for name, value in found.items()
        if name in manifest.tensors or name.split(".", 1)[0] not in form.held
    }
