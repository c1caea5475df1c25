"""The first operation in which two recordings of a step differ, and its first element."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from holdfast.parallel.output import content_of, json_lines
from holdfast.parallel.reading import read_regular
from holdfast.trainer.check import OUTPUT

_MOST_BYTES = 1 << 34


@dataclass(frozen=True, slots=True)
class Operation:
    """A recorded operation."""

    number: int
    name: str
    module: str
    backward: bool
    micro_batch: int
    inputs: tuple[str, ...]
    results: tuple[str, ...]

    @staticmethod
    def of(record: dict[str, Any]) -> Operation:
        """The operation of a line of the recording."""
        return Operation(
            number=int(record["number"]),
            name=str(record["operation"]),
            module=str(record["module"]).removeprefix("ModelChunk."),
            backward=bool(record["backward"]),
            micro_batch=int(record["micro_batch"]),
            inputs=tuple(map(str, record["inputs"])),
            results=tuple(json.dumps(result) for result in record["results"]),
        )

    def describe(self) -> str:
        """The operation for a person."""
        passage = "backward" if self.backward else "forward"
        where = f" in {self.module}" if self.module not in ("", "Global") else ""
        return f"{self.name}{where} ({passage} pass of micro-batch {self.micro_batch})"


@dataclass(frozen=True, slots=True)
class OperationDifference:
    """The first operation that differs; one that only one side has is None on the other."""

    first: Operation | None
    second: Operation | None

    @property
    def numbers(self) -> tuple[int, int]:
        """Its number on each side; -1 where there is none."""
        a, b = (-1 if side is None else side.number for side in (self.first, self.second))
        return a, b

    @property
    def is_other_program(self) -> bool:
        """Whether one side runs another operation there, so that values cannot be compared."""
        a, b = self.first, self.second
        return a is None or b is None or (a.name, len(a.results)) != (b.name, len(b.results))

    @property
    def differs_before(self) -> bool:
        """Whether its inputs differ already: what is no operation, a native kernel or data, made
        them."""
        a, b = self.first, self.second
        return (
            not self.is_other_program and a is not None and b is not None and (a.inputs != b.inputs)
        )


def first_operation(
    first: Path, second: Path, *, only_outputs: bool = False
) -> OperationDifference | None:
    """The first difference of two recordings; None: they are the same.

    Args:
        only_outputs: whether only the results of modules are compared.
    Raises:
        OSError: one cannot be read.
    """
    sides = [
        (o for o in _operations(path) if o.name == OUTPUT or not only_outputs)
        for path in (first, second)
    ]
    for a, b in zip_longest(*sides):
        if a is None or b is None or (a.name, a.inputs, a.results) != (b.name, b.inputs, b.results):
            return OperationDifference(a, b)
    return None


def _operations(path: Path) -> Iterator[Operation]:
    for _, record in json_lines(content_of(path)):
        if record is not None:
            yield Operation.of(record)


@dataclass(frozen=True, slots=True)
class ElementDifference:
    """The first element in which two tensors differ."""

    tensor: str
    index: tuple[int, ...]
    first: float | None
    second: float | None
    differing: int
    elements: int

    def describe(self) -> str:
        """The element for a person."""
        if self.first is None:
            return f"{self.tensor} has another shape or type"
        return (
            f"{self.tensor}, element {list(self.index)}: {self.first!r} in A and {self.second!r} "
            f"in B ({self.differing:,} of {self.elements:,} elements differ)"
        )


def first_element(name: str, first: Tensor, second: Tensor) -> ElementDifference | None:
    """The first element whose bits differ; None: there is none. Pure."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return ElementDifference(name, (), None, None, 0, first.numel())
    raw = [t.contiguous().view(-1).view(torch.uint8).view(t.numel(), -1) for t in (first, second)]
    places = (raw[0] != raw[1]).any(1).nonzero().flatten()
    if not len(places):
        return None
    index = tuple(int(n) for n in torch.unravel_index(places[0], first.shape))
    values = first.reshape(-1)[places[0]].item(), second.reshape(-1)[places[0]].item()
    return ElementDifference(name, index, *values, len(places), first.numel())


def first_value(first: Path, second: Path, numbers: tuple[int, int]) -> ElementDifference | None:
    """The first element in which the recorded values of an operation differ: inputs, then results.

    Args:
        numbers: that of the operation in each recording.
    Raises:
        OSError: a recording cannot be read.
    """
    a, b = (load(read_regular(path, _MOST_BYTES)) for path in (first, second))
    mine, others = (
        {key.partition(".")[2]: own[key] for key in own if key.startswith(f"{number}.")}
        for own, number in zip((a, b), numbers, strict=True)
    )
    for key in sorted(mine.keys() & others.keys()):  # inputs before results
        if found := first_element(key.replace(".", " "), mine[key], others[key]):
            return found
    return None
