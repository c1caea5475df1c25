"""The comparison of two checkpoints, tensor by tensor, whatever layout each was saved in. Local."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.checkpoint.format import STATE, TORCH_DTYPES, Manifest
from holdfast.checkpoint.loading import (
    ByteReader,
    LoadRequest,
    LoadTarget,
    check_coverage,
    load,
)
from holdfast.checkpoint.stores import PathOrUrl, checkpoint_at
from holdfast.checkpoint.tools.verify import check_small_parts
from holdfast.parallel.layout import Box

_PART_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """The difference of a tensor that both checkpoints have."""

    name: str
    elements: int
    differing: int
    """The number of elements with different bits."""
    largest: float
    """The largest absolute difference; infinite or NaN where one side is."""
    relative: float
    """The norm of the difference over the norm of the first's values."""
    first: tuple[int, ...] = ()
    """The place of the first element with different bits."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The differences of two checkpoints; they are equal when there are none."""

    steps: tuple[int, int]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_form: tuple[str, ...]
    """The tensors with different shapes or dtypes, with both forms."""
    values: tuple[TensorDifference, ...]
    scalars: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    compared: int = 0
    """The number of tensors that both have in the same form."""
    other_values: tuple[str, ...] = ()
    """The keys of a program's state whose values that are no tensors differ."""

    @property
    def equal(self) -> bool:
        """Whether every tensor and every value of a program's state is the same in both."""
        unequal = self.only_first or self.only_second or self.other_form or self.values
        return not (unequal or self.other_values)

    def as_dict(self) -> dict[str, Any]:
        """The difference as a dict for JSON; numbers that JSON lacks become text."""
        plain = asdict(self)
        for value in plain["values"]:
            for key in ("largest", "relative"):
                if not math.isfinite(value[key]):
                    value[key] = str(value[key])
        return {"equal": self.equal, **plain}


def diff_checkpoints(
    first: PathOrUrl,
    second: PathOrUrl,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Difference:
    """Compare two checkpoints, at paths or URLs, bit for bit; holds 64 MiB of each at a time.

    Raises:
        CheckpointError: a checkpoint is damaged or incomplete.
    """
    places = checkpoint_at(first), checkpoint_at(second)
    manifests = places[0].manifest(), places[1].manifest()
    for place, manifest in zip(places, manifests, strict=True):
        check_coverage(manifest, place.place)
    ours, theirs = manifests[0].tensors, manifests[1].tensors
    common = [name for name in ours if name in theirs]
    alike = [
        n for n in common if ours[n].dtype == theirs[n].dtype and ours[n].shape == theirs[n].shape
    ]
    other_form = tuple(
        f"{n}: {ours[n].dtype} {list(ours[n].shape)} and {theirs[n].dtype} {list(theirs[n].shape)}"
        for n in common
        if n not in set(alike)
    )
    readers = places[0].reader(), places[1].reader()
    for manifest, reader in zip(manifests, readers, strict=True):
        check_small_parts(manifest, reader, manifest.files)
    found: list[TensorDifference] = []
    done, total = 0, sum(ours[name].bytes for name in alike)
    try:
        for name in alike:
            counted = _Counted()
            for box in _parts(manifests[0], name):
                values = [
                    _values(manifest, reader, name, box, str(where))
                    for manifest, reader, where in zip(
                        manifests, readers, (first, second), strict=True
                    )
                ]
                counted.add(*values)
                done += values[0].numel() * values[0].element_size()
                progress(done, total)
            if counted.differing:
                found.append(counted.difference(name, ours[name].shape))
    finally:
        for reader in readers:
            reader.close()
    scalars = {
        key: (manifests[0].scalars.get(key), manifests[1].scalars.get(key))
        for key in sorted(manifests[0].scalars.keys() | manifests[1].scalars.keys())
        if manifests[0].scalars.get(key) != manifests[1].scalars.get(key)
    }
    return Difference(
        steps=(manifests[0].step, manifests[1].step),
        only_first=tuple(n for n in ours if n not in theirs),
        only_second=tuple(n for n in theirs if n not in ours),
        other_form=other_form,
        values=tuple(found),
        scalars=scalars,
        compared=len(alike),
        other_values=_other_values(*(manifest.scalars for manifest in manifests)),
    )


def _other_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a program's state that differ in what its documents say."""
    docs = [
        found if isinstance(found := of.get(STATE, {}), dict) else {"": found}
        for of in (first, second)
    ]
    keys = sorted(docs[0].keys() | docs[1].keys())
    # As text, a NaN is equal to itself, and 1 is neither 1.0 nor True.
    written = [{key: json.dumps(doc[key], sort_keys=True) for key in doc} for doc in docs]
    return tuple(key for key in keys if written[0].get(key) != written[1].get(key))


def _parts(manifest: Manifest, name: str) -> Iterator[Box]:
    """A tensor as boxes of whole rows, of at most `_PART_BYTES` each."""
    entry = manifest.tensors[name]
    whole = Box.whole(entry.shape)
    if not entry.shape or entry.bytes <= _PART_BYTES:
        yield whole
        return
    rows = max(1, _PART_BYTES * entry.shape[0] // entry.bytes)
    for start in range(0, entry.shape[0], rows):
        stop = min(entry.shape[0], start + rows)
        yield Box((start, *whole.start[1:]), (stop, *whole.stop[1:]))


def _values(manifest: Manifest, reader: ByteReader, name: str, box: Box, where: str) -> Tensor:
    values = torch.empty(box.shape, dtype=TORCH_DTYPES[manifest.tensors[name].dtype])
    targets, wanted = {name: [LoadTarget(box, values)]}, {0: {name: [box]}}
    load(LoadRequest(manifest, reader, targets, wanted, 0, where=where))
    return values


@dataclass(slots=True)
class _Counted:
    """The running comparison of one tensor."""

    elements: int = 0
    differing: int = 0
    largest: float = 0.0
    squares: float = 0.0
    difference_squares: float = 0.0
    first: int = -1

    def add(self, first: Tensor, second: Tensor) -> None:
        """Compare two parts bit for bit: -0.0 differs from 0.0, and a NaN equals itself."""
        self.elements += first.numel()
        if not first.numel():
            return
        raw = [
            t.contiguous().view(-1).view(torch.uint8).view(first.numel(), -1)
            for t in (first, second)
        ]
        unequal = (raw[0] != raw[1]).any(1)
        differing = int(unequal.sum())
        if differing and not self.differing:
            self.first = self.elements - first.numel() + int(unequal.nonzero()[0])
        self.differing += differing
        wide = first.double() if not first.is_complex() else first.abs().double()
        self.squares += float(wide.square().sum())
        if differing:
            gap = (first - second).abs().double() if first.is_complex() else wide - second.double()
            largest = float(gap.abs().max())
            self.largest = largest if not largest <= self.largest else self.largest
            self.difference_squares += float(gap.square().sum())

    def difference(self, name: str, shape: Sequence[int]) -> TensorDifference:
        relative = math.sqrt(self.difference_squares / self.squares) if self.squares else math.inf
        place = tuple(int(n) for n in torch.unravel_index(torch.tensor(self.first), tuple(shape)))
        return TensorDifference(name, self.elements, self.differing, self.largest, relative, place)
