"""The summary of a checkpoint, from its manifest alone: no tensor is read. Needs no torch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.checkpoint.format import ELEMENT_BYTES, STATE, WEIGHT, Manifest
from holdfast.checkpoint.stores import PathOrUrl, checkpoint_at
from holdfast.parallel.errors import shown


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """A logical tensor, and its pieces and files."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    chunks: int
    """The number of its pieces in the files."""
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A checkpoint at a glance."""

    path: str
    step: int
    created: float
    bytes: int
    parameters: int
    """The number of elements of all weights."""
    kinds: dict[str, dict[str, Any]]
    """By kind of tensor: the numbers of tensors and bytes, and the dtypes."""
    layout: dict[str, Any]
    """The [parallel] section of the run that saved it."""
    scalars: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, int]
    """The size in bytes of each file."""
    tensors: tuple[TensorSummary, ...]

    @property
    def state(self) -> dict[str, str]:
        """By key of a program's state: what it is, in a word or two. Empty for a run."""
        return _state_words(self.scalars.get(STATE))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_checkpoint(place: PathOrUrl) -> Summary:
    """Summarise the checkpoint at a path or URL.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    checkpoint = checkpoint_at(place)
    return summarise(checkpoint.manifest(), checkpoint.place)


def summarise(manifest: Manifest, where: str) -> Summary:
    """Summarise a manifest; see `inspect_checkpoint`. Pure."""
    pieces: defaultdict[str, int] = defaultdict(int)
    files: defaultdict[str, list[str]] = defaultdict(list)
    for file, entry in manifest.files.items():
        for name, listed in entry.pieces.items():
            pieces[name] += len(listed)
            files[name].append(file)
    kinds: dict[str, dict[str, Any]] = {}
    tensors = []
    for name, tensor in manifest.tensors.items():
        found = kinds.setdefault(tensor.kind, {"tensors": 0, "bytes": 0, "dtypes": []})
        found["tensors"] += 1
        found["bytes"] += tensor.bytes
        if tensor.dtype not in found["dtypes"]:
            found["dtypes"].append(tensor.dtype)
        tensors.append(
            TensorSummary(
                name,
                tensor.kind,
                tensor.dtype,
                tensor.shape,
                tensor.bytes,
                pieces[name],
                tuple(files[name]),
            )
        )
    layout = manifest.config.get("parallel")
    elements = [t.bytes // ELEMENT_BYTES[t.dtype] for t in tensors if t.kind == WEIGHT]
    return Summary(
        path=where,
        step=manifest.step,
        created=manifest.created,
        bytes=manifest.bytes,
        parameters=sum(elements),
        kinds=kinds,
        layout=dict(layout) if isinstance(layout, dict) else {},
        scalars=dict(manifest.scalars),
        versions=dict(manifest.versions),
        files={name: entry.bytes for name, entry in manifest.files.items()},
        tensors=tuple(tensors),
    )


def _state_words(docs: Any) -> dict[str, str]:
    """What the values of a program's state are; plain ones that are short stand as they are."""
    words = {}
    for key, doc in docs.items() if isinstance(docs, dict) else ():
        kind = doc.get("__holdfast__", "dict") if isinstance(doc, dict) else type(doc).__name__
        ranks = doc.get("value") if isinstance(doc, dict) and kind == "ranks" else None
        if isinstance(ranks, list):
            words[key] = f"(each of {len(ranks)} ranks has its own)"
        elif isinstance(doc, dict | list | str):
            words[key] = f"({kind})"
        else:
            words[key] = shown(doc)
    return words
