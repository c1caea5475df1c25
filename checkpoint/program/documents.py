"""The documents in a manifest that say what a program's state was, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from holdfast.checkpoint.format import STATE, STATE_VERSION, Manifest
from holdfast.checkpoint.program.values import TAG
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import of_kind


class _Module(TypedDict):
    tensors: dict[str, str]
    extra: dict[str, Any]


class _Group(TypedDict):
    params: list[str]


class _Optimizer(TypedDict):
    groups: list[_Group]
    state: dict[str, Any]
    other: list[tuple[Any, Any]]


class _Ranks(TypedDict):
    value: list[Any]


class _Tensor(TypedDict):
    name: str


_FORMS: tuple[tuple[str, Any], ...] = (
    ("module", _Module),
    ("optimizer", _Optimizer),
    ("ranks", _Ranks),
    ("tensor", _Tensor),
)
"""(type that a document names, the parts that it must have)"""


def documents_of(manifest: Manifest) -> tuple[Mapping[str, Any], bool]:
    """The documents by key, and whether they are written exactly (version 2).

    Raises:
        CheckpointError: they are no documents.
    """
    docs, version = manifest.scalars.get(STATE, {}), manifest.scalars.get(STATE_VERSION, 1)
    if not isinstance(docs, dict) or not isinstance(version, int):
        raise CheckpointError("the checkpoint is damaged: its state has another form")
    return docs, version >= 2


def checked(doc: Any, key: str) -> Any:
    """A document that has the parts of the type that it names.

    Raises:
        CheckpointError: it has not.
    """
    tag = doc.get(TAG) if isinstance(doc, dict) else None
    for name, form in _FORMS:
        if name == tag:
            try:
                of_kind(doc, form)
            except ValueError as error:
                raise CheckpointError(f"the checkpoint's {key} is damaged: {error}") from error
    return doc
