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


@dataclass(frozen=True, slots=True)
class SharedTarget:
    """A target that may share memory with others in part, and what is loaded for it."""

    name: str
    live: Tensor
    fresh: Tensor
    """Memory of its own, in the same shape."""


def without_overlaps(targets: Targets) -> tuple[Targets, list[list[SharedTarget]]]:
    """The targets, with fresh memory for those that may share memory with others in part. Local.

    Targets that are one tensor keep their memory.

    Returns:
        The targets to load to, and the shared ones, by groups whose memory meets, for
        `move_overlaps`.
    """
    fresh: dict[int, LoadTarget] = {}
    shared: list[list[SharedTarget]] = []
    for group in _groups(targets):
        shared.append([])
        for name, target in group:
            memory = torch.empty_like(target.memory)
            fresh[id(target)] = replace(target, memory=memory)
            shared[-1].append(SharedTarget(name, target.memory, memory))
    if not shared:
        return targets, shared
    separate = {name: [fresh.get(id(t), t) for t in found] for name, found in targets.items()}
    return separate, shared


def move_overlaps(shared: list[list[SharedTarget]]) -> None:
    """Move what was loaded to fresh memory to the live targets. Local.

    Raises:
        CheckpointError: targets share memory, and what was loaded to them differs there.
    """
    for group in shared:
        for target in group:
            target.live.copy_(target.fresh)
        for target in group:
            if not _same_bytes(target.live, target.fresh):
                names = sorted({other.name for other in group} - {target.name})
                raise CheckpointError(
                    f"{target.name} and {', '.join(names) or target.name} overlap in this "
                    "program's memory, and differ in the checkpoint; give each memory of its own "
                    "(clone()) before it is loaded"
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
