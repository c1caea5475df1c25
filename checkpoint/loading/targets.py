"""Where tensors are loaded to, and targets that share memory in this program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """The destination of a box of a tensor."""

    box: Box
    memory: Tensor
    """Memory in the box's shape, with any strides, on any device."""


Targets = Mapping[str, Sequence[LoadTarget]]
"""The targets by tensor; a box with two targets is read once."""


def without_overlaps(targets: Targets) -> Targets:
    """The targets, with fresh memory for those that may share memory with others in part. Local.

    Targets that are one tensor keep their memory.
    """
    shared = {id(target) for group in _groups(targets) for _, target in group}
    return {
        name: [
            replace(target, memory=torch.empty_like(target.memory))
            if id(target) in shared
            else target
            for target in found
        ]
        for name, found in targets.items()
    }


def move_overlaps(loaded: Targets, live: Targets) -> None:
    """Move what was loaded to fresh memory to the live targets. Local.

    Raises:
        CheckpointError: targets share memory, and what was loaded to them differs there.
    """
    fresh = {
        id(target): values.memory
        for name, found in live.items()
        for target, values in zip(found, loaded[name], strict=True)
        if target.memory is not values.memory
    }
    for group in _groups(live):
        for _, target in group:
            target.memory.copy_(fresh[id(target)])
        for name, target in group:
            if not _same_bytes(target.memory, fresh[id(target)]):
                others = ", ".join(sorted({other for other, _ in group} - {name})) or name
                raise CheckpointError(
                    f"{name} and {others} overlap in this program's memory, and differ in the "
                    "checkpoint; give each memory of its own (clone()) before it is loaded"
                )


def _groups(targets: Targets) -> Iterator[list[tuple[str, LoadTarget]]]:
    """The targets whose ranges of addresses meet, unless all of a group are one tensor."""
    every = [(name, t) for name, found in targets.items() for t in found if t.memory.numel()]
    every.sort(key=lambda named: (str(named[1].memory.device), named[1].memory.data_ptr()))
    group: list[tuple[str, LoadTarget]] = []
    end, device = 0, ""
    for name, target in every:
        memory = target.memory
        if group and (str(memory.device) != device or memory.data_ptr() >= end):
            yield from _unless_one(group)
            group, end = [], 0
        device, end = str(memory.device), max(end, _end_of(memory))
        group.append((name, target))
    yield from _unless_one(group)


def _unless_one(
    group: list[tuple[str, LoadTarget]],
) -> Iterator[list[tuple[str, LoadTarget]]]:
    views = {
        (m.data_ptr(), m.dtype, tuple(m.shape), m.stride()) for m in (t.memory for _, t in group)
    }
    if len(views) > 1:
        yield group


def _end_of(memory: Tensor) -> int:
    """The address behind the last byte of a tensor."""
    last = sum((n - 1) * s for n, s in zip(memory.shape, memory.stride(), strict=True))
    return memory.data_ptr() + (last + 1) * memory.element_size()


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type and shape are equal in all bits."""
    return torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )
