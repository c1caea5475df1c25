"""The agreement of all ranks on one save: what each writes, and that none loses what it has.

Ranks that hold the same box of a weight or of an optimizer's state must hold the same bytes. One
that does not is refused by name: it is a shard that does not say so, or a replica that has gone its
own way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import msgspec

from holdfast.checkpoint.format import BUFFER, TENSOR, WEIGHT, HeldBox, SavedTensor
from holdfast.checkpoint.program.described import Described, ProgramState, describe
from holdfast.checkpoint.program.meeting import Meeting
from holdfast.checkpoint.program.merging import Marks, merge, own_name
from holdfast.checkpoint.program.tensors import ProgramTensor, fingerprint
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

Holders = Mapping[str, Mapping[Box, tuple[int, ...]]]
"""By tensor and box: the ranks that have it."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What is saved, as one rank sees it."""

    mine: Sequence[ProgramTensor]
    """This rank's tensors."""
    docs: Mapping[str, Any]
    """The documents of all ranks, by key."""
    tensors: Sequence[SavedTensor]
    """The tensors of all ranks; the same object until one changes in form."""


@dataclass(frozen=True, slots=True)
class _Form:
    """The names, types, shapes and boxes of all ranks' tensors."""

    digests: tuple[str, ...]
    """By rank: the digest of its description."""
    tensors: Sequence[SavedTensor]
    holders: Holders


class Agreement:
    """Reaches the agreement for one save after the other. Collective."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._form = _Form((), [], {})

    def reach(self, state: ProgramState, facts: Any) -> Agreed:
        """Agree on a save of the present state. Collective.

        Args:
            facts: what has to be equal on all ranks, for the message; has a JSON form.
        Raises:
            CheckpointError: on every rank alike, before anything is written: a leaf cannot be
                saved, or differs where it must not.
        """
        meeting = self._meeting
        (found, marks), answers = meeting.agree(
            "save", lambda: _described(state), lambda told: self._told(*told, facts)
        )
        for rank, answer in enumerate(answers):
            if answer["facts"] != answers[0]["facts"]:
                raise CheckpointError(
                    f"rank 0 saves {answers[0]['facts']}, and rank {rank} {answer['facts']}"
                )
        mine: Sequence[ProgramTensor] = found.tensors
        docs: Mapping[str, Any] = found.docs
        digests = tuple(answer["form"] for answer in answers)
        if any(answer["values"] != answers[0]["values"] for answer in answers):
            content = {"docs": docs, "marks": marks}
            told = meeting.exchange("docs", content)
            docs, own = merge([rank["docs"] for rank in told], [rank["marks"] for rank in told])
            if own:
                mine = [_own(entry, meeting.rank, own) for entry in mine]
                digests = tuple(meeting.exchange("form", _digest(_form_of(mine))))
        shared = [answer["shared"] for answer in answers]
        if digests != self._form.digests:
            self._form = _form(digests, meeting.exchange("tensors", _form_of(mine)))
            shared = meeting.exchange("shared", self._shared(mine))
        self._check_shared(mine, shared)
        return Agreed(mine, docs, self._form.tensors)

    def _told(self, found: Described, marks: Marks, facts: Any) -> dict[str, Any]:
        return {
            "facts": facts,
            "values": _digest([found.docs, marks]),
            "form": _digest(_form_of(found.tensors)),
            "shared": self._shared(found.tensors),
        }

    def _sharing(
        self, mine: Sequence[ProgramTensor]
    ) -> Iterator[tuple[ProgramTensor, tuple[int, ...]]]:
        """The tensors that other ranks hold as well, with the ranks that hold them."""
        for entry in mine:
            holders = self._form.holders.get(entry.name, {}).get(entry.box, ())
            if len(holders) > 1 and not entry.own and not entry.led:
                yield entry, holders

    def _shared(self, mine: Sequence[ProgramTensor]) -> dict[str, str]:
        """A digest of the contents that this rank shares, for each group of ranks."""
        found: defaultdict[tuple[int, ...], list[Any]] = defaultdict(list)
        for entry, holders in self._sharing(mine):
            found[holders].append([entry.name, fingerprint(entry.local)])
        return {_digest(holders): _digest(contents) for holders, contents in found.items()}

    def _check_shared(
        self, mine: Sequence[ProgramTensor], shared: Sequence[Mapping[str, str]]
    ) -> None:
        known: dict[str, str] = {}
        if all(
            known.setdefault(group, digest) == digest
            for answer in shared
            for group, digest in answer.items()
        ):
            return
        contents = {
            entry.name: [entry.box.start, entry.box.stop, fingerprint(entry.local)]
            for entry, _ in self._sharing(mine)
        }
        seen: dict[tuple[Any, ...], tuple[int, int]] = {}
        for rank, answer in enumerate(self._meeting.exchange("contents", contents)):
            for name, (start, stop, mark) in answer.items():
                first, known_mark = seen.setdefault((name, *start, *stop), (rank, mark))
                if mark != known_mark:
                    raise CheckpointError(
                        f"{name} differs between rank {first} and rank {rank}, and is no DTensor "
                        "that says which part each has; make it equal on all ranks, a DTensor, or "
                        "a plain value of the state, of which each rank may have its own"
                    )
        raise CheckpointError("the state changed while it was saved")


def _own(entry: ProgramTensor, rank: int, keys: set[str]) -> ProgramTensor:
    """The entry under the name of this rank's own value, where each rank of its key has one."""
    if not entry.own or entry.key not in keys:
        return entry
    return replace(entry, name=own_name(entry.name, rank), kind=own_kind(entry.kind, rank))


def own_kind(kind: str, rank: int) -> str:
    """The kind of a rank's own tensor; other ranks' buffers are none for model loaders."""
    return TENSOR if rank and kind == BUFFER else kind


def _described(state: ProgramState) -> tuple[Described, Marks]:
    """The state of this rank, and the marks of what each rank may have its own of."""
    found = describe(state)
    return found, {
        entry.name: [fingerprint(entry.local), entry.dtype, entry.shape]
        for entry in found.tensors
        if entry.own
    }


def _digest(content: Any) -> str:
    return blake2b(msgspec.json.encode(content), digest_size=16).hexdigest()


def _form_of(mine: Sequence[ProgramTensor]) -> list[Any]:
    return [[e.name, e.kind, e.dtype, e.shape, e.box.start, e.box.stop, e.led] for e in mine]


def _form(digests: tuple[str, ...], described: Sequence[Sequence[Any]]) -> _Form:
    """The tensors of all ranks: each box with the ranks that hold it."""
    holders: defaultdict[str, dict[Box, list[int]]] = defaultdict(dict)
    form: dict[str, tuple[str, str, tuple[int, ...], bool]] = {}
    for rank, entries in enumerate(described):
        for name, kind, dtype, shape, start, stop, led in entries:
            box = Box(tuple(start), tuple(stop))
            known = form.setdefault(name, (kind, dtype, tuple(shape), led))
            if known[:3] != (kind, dtype, tuple(shape)):
                raise CheckpointError(
                    f"{name} is {known[1]} {list(known[2])} on one rank and {dtype} {list(shape)} "
                    f"on rank {rank}; make it equal on all ranks, or a DTensor"
                )
            if box.elements or not all(shape):
                holders[name].setdefault(box, []).append(rank)
    tensors = []
    for name, (kind, dtype, shape, led) in form.items():
        parts = tuple(
            HeldBox(box, tuple(ranks[:1] if led else ranks)) for box, ranks in holders[name].items()
        )
        rows = all(part.box.start[1:] == (0,) * len(shape[1:]) for part in parts) and all(
            part.box.stop[1:] == shape[1:] for part in parts
        )
        whole = kind in (WEIGHT, BUFFER) and rows
        tensors.append(SavedTensor(name, kind, dtype, shape, parts, whole))
    by_box = {
        name: {box: tuple(ranks) for box, ranks in boxes.items()} for name, boxes in holders.items()
    }
    return _Form(digests, tensors, by_box)
