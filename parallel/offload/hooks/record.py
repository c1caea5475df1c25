"""A record: one storage that autograd has saved, however many tensors on it were saved."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from holdfast.parallel.errors import OffloadError
from holdfast.parallel.offload.stores import StoredCopy


class Record:
    """The state of a saved storage: in memory, on its way out, away, or back. Local.

    Only `memory` holds the storage's memory. Releasing it frees the memory unless others use it.
    """

    __slots__ = (
        "__weakref__",
        "_changes",
        "_dead",
        "_original",
        "ahead",
        "asked",
        "cleared",
        "copy",
        "index",
        "memory",
        "nbytes",
        "scope",
        "version",
    )

    def __init__(self, tensor: Tensor, storage: torch.UntypedStorage, dead: deque[Dead]) -> None:
        self._original = StorageWeakRef(storage)
        self._changes = tensor.detach()
        """Shares the tensor's version counter; its memory is freed with `memory`."""
        self._dead = dead
        self.version = tensor._version
        self.nbytes = storage.nbytes()
        empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        self.memory: Tensor | None = empty.set_(storage)
        """uint8[nbytes], the storage's bytes, while they are in memory."""
        self.copy: StoredCopy | None = None
        self.scope: object = None
        self.index = 0
        """Its position among the storages that one forward pass has saved."""
        self.ahead = False
        """Whether it was brought back before it was asked for."""
        self.asked = False
        self.cleared = False

    def __del__(self) -> None:
        if self.copy is not None or self.ahead:
            self._dead.append(self.remains())

    def remains(self) -> Dead:
        """The copy that must be released for it; the record does not own the copy any more."""
        dead = Dead(self.copy, self.nbytes if self.ahead else 0)
        self.copy, self.ahead = None, False
        return dead

    def describes(self, version: int) -> bool:
        """Whether a tensor of this version on the storage has the same content."""
        return self.version == version and not self.cleared

    def let_go(self) -> None:
        """Free the memory; its bytes are stored, or given up."""
        self.memory = None
        self._changes.data = _nothing(self._changes.dtype, self._changes.device)

    def clear(self) -> None:
        """Forget the saved bytes."""
        self.cleared = True
        self.let_go()

    def revive(self) -> bool:
        """Use the original memory again if another reference has kept it alive."""
        if self.memory is None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self._original.cdata)
            if storage is not None:
                empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
                self.memory = empty.set_(storage)
        return self.memory is not None

    @property
    def original(self) -> StorageWeakRef:
        """The storage that was saved.

        While this reference is kept, no other storage can take its place.
        """
        return self._original

    def check(self) -> None:
        """Raise RuntimeError, as torch does, if the tensor was changed since it was saved."""
        if self.cleared:
            raise OffloadError(
                "activations of a step that was given up are asked for; run its forward pass again"
            )
        check_unchanged(self._changes, self.version)


@dataclass(slots=True)
class Dead:
    """The remains of a record that has no reference any more."""

    copy: StoredCopy | None
    ahead_bytes: int


class SavedView(NamedTuple):
    """One tensor on a record's storage, as autograd keeps it."""

    record: Record
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """The tensor's offset in the storage, in elements."""

    @classmethod
    def of(cls, tensor: Tensor, record: Record) -> SavedView:
        """The view of a tensor that lies on a record's storage."""
        offset = int(tensor.storage_offset())
        return cls(record, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def tensor(self) -> Tensor:
        """The tensor as it was saved; the record's memory must be there."""
        memory = self.record.memory
        assert memory is not None
        start = memory.storage_offset() // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), start + self.offset, self.shape, self.stride)


class Kept(NamedTuple):
    """A tensor that stays in memory, as autograd keeps it."""

    tensor: Tensor
    version: int

    def check(self) -> None:
        """Raise RuntimeError, as torch does, if the tensor was changed since it was saved."""
        check_unchanged(self.tensor, self.version)


@lru_cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without memory, shared by all records because making one takes longer."""
    return torch.empty(0, dtype=dtype, device=device)


def check_unchanged(tensor: Tensor, version: int) -> None:
    """Raise RuntimeError if a saved tensor has another version than `version`."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a saved tensor is at version {tensor._version}; expected version "
            f"{version} instead"
        )
