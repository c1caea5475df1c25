"""The ranks' documents made one. Pure; needs no torch.

What differs by rank is kept for each rank where that has a meaning (plain values, random states,
extra state, buffers), and refused by its path where it has none (weights, optimizers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from holdfast.checkpoint.program.values import TAG, references, with_names
from holdfast.parallel.errors import CheckpointError

Docs = Mapping[str, Any]
Marks = Mapping[str, Any]
"""By name: what two ranks' tensors have in common if they are equal (checksum, type, shape)."""
OWN_NAME = re.compile(r".*@\d+", re.DOTALL)
"""The form of the names that `own_name` gives; nothing else of which ranks have their own has it.
"""


def merge(docs: Sequence[Docs], marks: Sequence[Marks]) -> tuple[dict[str, Any], set[str]]:
    """(The documents of all ranks by key, the keys of which each rank has its own). Pure.

    Args:
        docs: by rank.
        marks: by rank, of the tensors of which each rank may have its own.
    Raises:
        CheckpointError: ranks have different keys, or differ where they must be equal.
    """
    keys = list(docs[0])
    for rank, found in enumerate(docs):
        if list(found) != keys:
            raise CheckpointError(
                f"the state's keys differ: {', '.join(keys)} on rank 0 and {', '.join(found)} on "
                f"rank {rank}"
            )
    merged: dict[str, Any] = {}
    own: set[str] = set()
    for key in keys:
        of_ranks = [found[key] for found in docs]
        kind = of_ranks[0].get(TAG) if isinstance(of_ranks[0], dict) else None
        if kind == "optimizer":
            merged[key] = of_ranks[0] if _all_equal(of_ranks) else merge_optimizers(key, of_ranks)
        elif kind == "module" and (one := _merge_modules(of_ranks, marks)) is not None:
            merged[key] = one
        elif kind != "module" and _all_equal(of_ranks) and _same_tensors(of_ranks, marks):
            merged[key] = of_ranks[0]
        else:
            own.add(key)
            merged[key] = {
                TAG: "ranks",
                "value": [own_names(doc, rank, marks[rank]) for rank, doc in enumerate(of_ranks)],
            }
    return merged, own


def own_name(name: str, rank: int) -> str:
    """The name of a rank's own value of a tensor; the first rank's is the plain name."""
    return f"{name}@{rank}" if rank else name


def own_names(doc: Any, rank: int, marks: Marks) -> Any:
    """A rank's document with the names of its own tensors."""
    names = {name: own_name(name, rank) for name in marks}
    renamed = with_names(doc, names)
    if isinstance(renamed, dict) and renamed.get(TAG) == "module":
        listed = {n: names.get(full, full) for n, full in renamed["tensors"].items()}
        return {**renamed, "tensors": listed}
    return renamed


def _same(a: Any, b: Any) -> bool:
    """Whether two documents are equal in types too: 1 is neither True nor 1.0, 0.0 is not -0.0."""
    return msgspec.json.encode(a) == msgspec.json.encode(b)


def _all_equal(values: Sequence[Any]) -> bool:
    return all(_same(value, values[0]) for value in values)


def _same_tensors(docs: Sequence[Any], marks: Sequence[Marks]) -> bool:
    return all(_all_equal([found.get(name) for found in marks]) for name in references(docs[0]))


def _merge_modules(docs: Sequence[Any], marks: Sequence[Marks]) -> Any:
    """The documents of a module's parts as one; None if ranks differ in what several have."""
    tensors: dict[str, str] = {}
    extra: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    for doc, found in zip(docs, marks, strict=True):
        for name, full in doc["tensors"].items():
            if tensors.setdefault(name, full) != full:
                return None
        for name, value in doc["extra"].items():
            if not _same(extra.setdefault(name, value), value):
                return None
        for name in (*doc["tensors"].values(), *references(doc["extra"])):
            if name in found and seen.setdefault(name, found[name]) != found[name]:
                return None
    return {TAG: "module", "tensors": tensors, "extra": extra}


def merge_optimizers(key: str, docs: Sequence[Any]) -> dict[str, Any]:
    """The documents of one optimizer of which ranks have different parameters, as one.

    Raises:
        CheckpointError: ranks differ in a value of a parameter or a group that several have.
    """
    groups: list[dict[str, Any]] = []
    place: dict[str, int] = {}
    states: dict[str, Any] = {}
    for rank, doc in enumerate(docs):
        before = set(place)
        for number, group in enumerate(doc["groups"]):
            found = _place_of(key, rank, number, group, groups, place)
            if found == len(groups):
                groups.append({**group, "params": []})
            for name in group["params"]:
                if name not in place:
                    place[name] = found
                    groups[found]["params"].append(name)
        for name in before & {name for group in doc["groups"] for name in group["params"]}:
            if not _same(states.get(name), doc["state"].get(name)):
                raise CheckpointError(
                    f"{key}.state[{name}] differs between rank {rank} and one before it; an "
                    "optimizer's values have to be equal on all ranks that have the parameter"
                )
        states |= doc["state"]
        if not _same(doc["other"], docs[0]["other"]):
            raise CheckpointError(f"{key}.state differs between rank 0 and rank {rank}")
    other = docs[0]["other"]
    return {TAG: "optimizer", "groups": groups, "state": states, "other": other, "merged": True}


def _place_of(
    key: str,
    rank: int,
    number: int,
    group: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    place: Mapping[str, int],
) -> int:
    """The number of the merged group that a rank's group belongs to; one more than there are if
    none."""
    known = sorted({place[name] for name in group["params"] if name in place})
    if len(known) > 1:
        raise CheckpointError(
            f"{key}: rank {rank} has the parameters of param_groups[{number}] in one group, and "
            "another rank has them in several"
        )
    empty = number < len(groups) and not groups[number]["params"] and not group["params"]
    if not known and not empty:
        same = number < len(groups) and _same(_values(groups[number]), _values(group))
        return number if same else len(groups)
    found = known[0] if known else number
    theirs, ours = _values(groups[found]), _values(group)
    wrong = [n for n in (*theirs, *ours) if not _same(theirs.get(n, [[]]), ours.get(n, [[]]))]
    if wrong:
        raise CheckpointError(
            f"{key}.param_groups[{number}][{wrong[0]!r}] differs between rank {rank} and one "
            "before it; a group's values have to be equal on all ranks"
        )
    return found


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
