"""The views of a rank's live state for checkpoints, and the small files beside it."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from holdfast.checkpoint.format import WEIGHT, PlannedPiece
from holdfast.checkpoint.loading import LoadTarget
from holdfast.parallel.layout import Box
from holdfast.parallel.optimizer import (
    BlockNumbers,
    ParameterBuffer,
    Segment,
    ShadowState,
    ShardedOptimizer,
)
from holdfast.parallel.plan import Plan, block_box
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import exported_tokenizer
from holdfast.trainer.models import family_of
from holdfast.trainer.step.saved_tensors import wanted_boxes


@dataclass(frozen=True, slots=True)
class _KeptRows:
    """Rows of a weight whose state this rank keeps, as owner or as shadow."""

    first: int
    last: int
    number: int
    """The number of the block among the owned or the shadowed blocks."""
    place: int
    """The position of its first element in the flat state."""


def block_numbers(optimizer: ShardedOptimizer, shadows: ShadowState | None) -> BlockNumbers:
    """The numbers of a rank's blocks for the fence of a snapshot. Pure.

    Args:
        shadows: the copies that are saved instead of the owned state; None: owners save.
    """
    return BlockNumbers(0 if shadows is None else len(shadows.blocks), len(optimizer.owned))


_Columns = tuple[tuple[int, ...], tuple[int, ...]]


class TrainingState:
    """The place of one rank's part of the saved tensors. Local; returns views of live memory."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        buffer: ParameterBuffer,
        optimizer: ShardedOptimizer,
        shadows: ShadowState | None = None,
    ) -> None:
        """The views follow the plan; nothing is copied.

        Args:
            plan, rank: say which boxes this rank has; `precision` which kinds of state.
            buffer, optimizer: hold its parameters and the state of the blocks that it owns.
            shadows: the copies that are saved instead of their owners' state; None: owners save.
        """
        self._plan, self._rank, self._form = plan, rank, optimizer.form
        self._buffer = buffer
        self._state = optimizer.state
        self._segments: defaultdict[str, list[Segment]] = defaultdict(list)
        for segment in sorted(buffer.segments, key=lambda s: s.spec.tied_use):
            self._segments[segment.spec.name].append(segment)
        self._rows: defaultdict[str, dict[_Columns, list[_KeptRows]]] = defaultdict(dict)
        place = 0
        self._guests: defaultdict[str, list[tuple[Box, Tensor]]] = defaultdict(list)
        for number, block in enumerate(optimizer.owned):
            spec = block.spec
            if block.is_guest:
                box = block_box(spec, block.block)
                values = optimizer.parameters(number).view(box.shape)
                self._guests[spec.name].append((box, values))
            first_row = spec.box.start[0] + block.block.row_start
            last_row = spec.box.start[0] + block.block.row_stop
            rows = _KeptRows(first_row, last_row, number, place)
            self._rows[spec.name].setdefault(_columns(spec.box), []).append(rows)
            place += block.block.elements
        self._shadows = shadows
        self._numbers = block_numbers(optimizer, shadows)
        self._shadowed_rows: defaultdict[tuple[str, _Columns], list[_KeptRows]] = defaultdict(list)
        for number, block in enumerate(() if shadows is None else shadows.blocks):
            placed = plan.block(block.key)
            spec = plan.spec_of(placed)
            box = block_box(spec, placed)
            self._shadowed_rows[spec.name, _columns(box)].append(
                _KeptRows(box.start[0], box.stop[0], number, block.start)
            )
        for shadowed in self._shadowed_rows.values():
            shadowed.sort(key=lambda found: found.first)

    def _shadow(self, name: str, box: Box) -> tuple[str, _KeptRows] | None:
        """The kind and the block of a box's saved copy; None if the box is not shadowed here."""
        kind, _, base = name.partition(".")
        if kind not in self._state:
            kind, base = WEIGHT, name
        rows = self._shadowed_rows.get((base, _columns(box)), [])
        place = bisect_right(rows, box.start[0], key=lambda found: found.first) - 1
        if place < 0 or rows[place].last <= box.start[0]:
            return None
        return kind, rows[place]

    def views(self, name: str, box: Box) -> list[Tensor]:
        """Every place where this rank keeps a box of a tensor; two for a tied weight."""
        kind, _, base = name.partition(".")
        if kind not in self._state:
            held = [
                view
                for segment in self._segments[name]
                if (view := _kept_view(self._buffer, segment, box)) is not None
            ]
            return held + [
                values[box.relative_to(own).slices]
                for own, values in self._guests[name]
                if own.contains(box)
            ]
        rows = self._rows[base][_columns(box)]
        at = rows[bisect_right(rows, box.start[0], key=lambda found: found.first) - 1]
        row_elements = box.elements // box.shape[0]
        start = at.place + (box.start[0] - at.first) * row_elements
        return [self._state[kind].part(start, start + box.elements).view(box.shape)]

    def source(self, name: str, box: Box) -> Tensor:
        """The live values of a box: contiguous."""
        found = self._shadow(name, box)
        if found is None:
            return self.views(name, box)[0]
        assert self._shadows is not None
        kind, rows = found
        start = rows.place + (box.start[0] - rows.first) * (box.elements // box.shape[0])
        copies = self._shadows.weights if kind == WEIGHT else self._shadows.state[kind]
        return copies.part(start, start + box.elements).view(box.shape)

    def before(self, piece: PlannedPiece) -> int:
        """The first block whose update overwrites a piece; the number of all blocks if none does.

        Blocks are numbered as by `block_numbers`.
        """
        shadow = self._shadow(piece.name, piece.box)
        if shadow is not None:
            return shadow[1].number
        kind, _, base = piece.name.partition(".")
        by_columns = self._rows.get(base if kind in self._state else piece.name, {})
        rows = chain.from_iterable(by_columns.values())
        first, last = piece.box.start[0], piece.box.stop[0]
        overlapping = (found.number for found in rows if found.first < last and found.last > first)
        return self._numbers.of_owned(min(overlapping, default=self._numbers.owned))

    def targets(self) -> dict[str, list[LoadTarget]]:
        """The targets of everything that this rank loads."""
        wanted = wanted_boxes(self._plan, self._rank, self._form)
        return {
            name: [LoadTarget(box, view) for box in boxes for view in self.views(name, box)]
            for name, boxes in wanted.items()
        }


def _kept_view(buffer: ParameterBuffer, segment: Segment, box: Box) -> Tensor | None:
    """A box of a segment among the parameters that a rank keeps; None if it is not all there."""
    if not segment.spec.box.contains(box):
        return None  # it is in another part of the tensor
    rows, *columns = box.relative_to(segment.spec.box).slices
    row_elements = segment.spec.row_elements
    start = segment.offset + rows.start * row_elements
    stop = segment.offset + rows.stop * row_elements
    if not buffer.kept.has(start, stop):
        return None
    shape = (box.shape[0], *segment.spec.box.shape[1:])
    return buffer.part(start, stop).view(shape)[(slice(None), *columns)]


def _columns(box: Box) -> _Columns:
    return box.start[1:], box.stop[1:]


def huggingface_files(config: RunConfig) -> dict[str, bytes]:
    """config.json and the other files of a Hugging Face model folder."""
    model, train = config.model, config.train
    dtype = PRECISIONS[train.precision].torch_name
    described = family_of(model.family).config_json(model, train.seq_len, dtype)
    tokenizer = exported_tokenizer(config.data, max(model.max_seq_len, train.seq_len))
    # A document begins where the one before has ended. What is not known is said to be none: for a
    # missing key transformers takes the ids of its family's first model.
    ends = {f"{place}_token_id": tokenizer.separator for place in ("bos", "eos")}
    known = ends if tokenizer.separator is not None else {}
    return {
        "config.json": _json({**described, **ends}),
        "generation_config.json": _json({"_from_model_config": True, **known}),
        **tokenizer.files,
    }


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
