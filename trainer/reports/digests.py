"""digests.jsonl: what runs are compared by, a line for each step, chained by hash.

A line has the loss before the update, and of each layer the weighted sums of the bits of its
gradients and of its parameters before the update (`ShardedOptimizer.bit_sums`). None of it depends
on the layout in exact mode. The chain is the SHA-256 of the chain before and of the line, so two
runs with the same chain had the same bits in all steps until then, and no line can be replaced
alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.parallel.output import AppendedFile, DiskWord, Tail, content_of, json_lines, step_of
from holdfast.trainer.reports.metrics import drop_after

BEGINNING = "0" * 64
"""The chain before the first line."""
_DIGITS = 16
"""The hexadecimal digits of a layer's sum."""


@dataclass(frozen=True, slots=True)
class StepDigests:
    """The digests of one step."""

    step: int
    """Counted from 1."""
    loss_hex: str
    gradients: tuple[int, ...]
    """Of each layer, the sum modulo 2**64, before clipping."""
    parameters: tuple[int, ...]
    """Of each layer, before the update."""

    def content(self) -> dict[str, Any]:
        """The keys of the line, without the chain."""
        return {
            "step": self.step,
            "loss_hex": self.loss_hex,
            "gradients": _hexadecimal(self.gradients),
            "parameters": _hexadecimal(self.parameters),
        }

    def chain(self, before: str) -> str:
        """The chain after this step, from the one before it: 64 hexadecimal digits."""
        content = json.dumps(self.content(), separators=(",", ":"))
        return hashlib.sha256(f"{before}\n{content}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class DigestLine:
    """A line of the file."""

    digests: StepDigests
    chain: str


def _hexadecimal(sums: Iterable[int]) -> str:
    return "".join(f"{total:0{_DIGITS}x}" for total in sums)


def _numbers(text: Any) -> tuple[int, ...]:
    if not isinstance(text, str) or len(text) % _DIGITS:
        raise ValueError("it has no sums of layers")
    return tuple(int(text[at : at + _DIGITS], 16) for at in range(0, len(text), _DIGITS))


def read_digests(path: Path) -> list[DigestLine]:
    """The lines of a file, in order; what is no such line is passed over.

    Raises:
        OSError: the file is there, but cannot be read.
    """
    found = []
    for _, record in json_lines(content_of(path)):
        if not (step := step_of(record)) or record is None:
            continue
        with contextlib.suppress(ValueError):
            sums = _numbers(record.get("gradients")), _numbers(record.get("parameters"))
            loss, chain = record.get("loss_hex"), record.get("chain")
            if isinstance(loss, str) and isinstance(chain, str):
                found.append(DigestLine(StepDigests(step, loss, *sums), chain))
    return found


def digests_by_step(path: Path) -> dict[int, StepDigests]:
    """The digests in a file by their step; see `read_digests`."""
    return {line.digests.step: line.digests for line in read_digests(path)}


def broken_links(lines: Iterable[DigestLine]) -> list[int]:
    """The steps whose lines do not follow from those before them. Pure."""
    before, found = BEGINNING, []
    for line in lines:
        if line.chain != line.digests.chain(before):
            found.append(line.digests.step)
        before = line.chain
    return found


class DigestFile:
    """The file of one run, on the rank that writes it. Local; no method raises OSError."""

    def __init__(self, path: Path, word: DiskWord) -> None:
        """Go on behind what the file has."""
        self._file = AppendedFile(path, word, Tail.SET_ASIDE)
        self._step, self._chain = 0, BEGINNING
        with contextlib.suppress(OSError):
            if lines := read_digests(path):
                self._step, self._chain = lines[-1].digests.step, lines[-1].chain

    def step(self, digests: StepDigests) -> None:
        """Add a step, unless the file has it."""
        if digests.step <= self._step:
            return
        self._step, self._chain = digests.step, digests.chain(self._chain)
        line = json.dumps({**digests.content(), "chain": self._chain})
        self._file.append(line.encode() + b"\n")

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def forget_after(path: Path, step: int) -> None:
        """Cut the lines of later steps, which a run repeats, where the disk allows it."""
        with contextlib.suppress(OSError):
            drop_after(path, step)
