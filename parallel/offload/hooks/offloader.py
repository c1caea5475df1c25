"""Sends what autograd saves to an SSD, or to host memory, and brings it back for the backward pass.

SSDTrain (Wu et al. 2024) with torch's saved-tensor hooks alone: no patched modules, any device, any graph.
Exact-mode safe: what comes back has the same bits and the same alignment.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from holdfast.parallel.errors import OffloadError
from holdfast.parallel.offload.hooks.account import Account
from holdfast.parallel.offload.hooks.eligibility import movable_storage
from holdfast.parallel.offload.hooks.pace import Pace
from holdfast.parallel.offload.hooks.prefetch import Prefetch, Scope
from holdfast.parallel.offload.hooks.record import Dead, Kept, Record, Saved
from holdfast.parallel.offload.policy import Amount, Bounds, OffloadReport, next_amount
from holdfast.parallel.offload.stores import (
    DiskFile,
    DiskStore,
    HostStore,
    StagedStore,
    Store,
    StoreStatistics,
    is_past,
)

logger = logging.getLogger("holdfast.offload")

_POLL_S = 5e-5
_TIDY_S = 1e-3
"""How long what could be free may stay: writes of a MiB take longer."""


class Offloader:
    """Saved tensors wait elsewhere between the forward and the backward pass. Local.

    Used as a context around forward passes (and, if one likes, their backward passes)::

        offloader = Offloader("/nvme")
        for batch in batches:
            with offloader:
                model(batch).backward()

    Every leaving of the context ends a step, after which the amount is adapted. Stay in memory: leaves
    that require gradients, views of them, what `keep` names, storages below `smallest_bytes`, whatever the
    drive is too slow for, and what turns out to be held by others anyway. A storage is sent once, however
    many tensors on it are saved. Changes that autograd is not told of (`.data`) are not noticed.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        limit_bytes: int = 0,
        smallest_bytes: int = 256 << 10,
        bounds: Bounds | None = None,
        bytes_per_s: float = 0.0,
        staging_bytes: int = 1 << 30,
        on_fault: Callable[[str], None] | None = None,
    ) -> None:
        """Args:
            path: folder on the drive; None: host memory (pinned, of use on a GPU only).
            limit_bytes: the most that is away at once; 0: no limit.
            bounds: of the share of the activations that is sent; equal ones fix it.
            bytes_per_s: the most that goes to and from the drive; 0: whatever it can do.
            staging_bytes: host memory between a GPU and the drive; 1 GiB at most.
            on_fault: is told, once, why less is sent from now on.
        Raises:
            ConfigError: no file can be made in the folder.
        """
        self._limit, self._staging = limit_bytes, staging_bytes
        self._smallest = smallest_bytes
        self._bounds = bounds or Bounds()
        self._file: DiskFile | None = None
        if path is not None:
            self._file = DiskFile(path, limit_bytes=limit_bytes, bytes_per_s=bytes_per_s)
            weakref.finalize(self, self._file.close)
        self._on_fault, self._told = on_fault, False
        self._lock = threading.RLock()
        self._store: Store | None = None
        self._device = torch.device("cpu")
        self._records: weakref.WeakValueDictionary[int, Record] = weakref.WeakValueDictionary()
        self._held: dict[int, StorageWeakRef] = {}
        """Storages that leave no memory free when they are sent: others hold them."""
        self._leaving: list[Record] = []
        self._leaving_bytes = 0
        self._dead: deque[Dead] = deque()
        self._prefetch = Prefetch(self._fetch)
        self._scope, self._at_once = Scope(None), True
        self._kind: Hashable = None
        self._expected: dict[Hashable, int] = {}
        """The eligible bytes of a forward pass, by its kind."""
        self._amount = Amount(share=self._bounds.most_share)
        self._credit = 0.0
        self._pace = Pace()
        self._contexts: list[AbstractContextManager[Any]] = []
        self._account = Account()
        self._in_step = self._closed = False
        self._tidied_s = 0.0
        self._stopped = ""
        self.last_step = OffloadReport()
        """What the step before the one that is under way has sent."""

    def keep(self, *what: nn.Module | Tensor) -> None:
        """Leave these tensors, or a module's parameters and buffers, in memory while they live."""
        for thing in what:
            tensors = [thing] if isinstance(thing, Tensor) else _tensors_of(thing)
            for tensor in tensors:
                self._hold(StorageWeakRef(tensor.untyped_storage()))

    def __enter__(self) -> Offloader:
        if not self._contexts:
            self.begin_step()
            self._open(None, None, at_once=True)
        self._enter_hooks()
        return self

    def __exit__(self, *error: object) -> None:
        self._contexts.pop().__exit__(None, None, None)
        if not self._contexts:
            self._expected[None] = self._scope.nbytes
            self.end_step()

    def begin_step(self, backward_order: Iterable[Hashable] = ()) -> None:
        """A step of a program begins. One that has not ended is given up, as by `clear`.

        Args:
            backward_order: the keys of its forward passes, in the order of their backward passes.
        """
        if self._in_step:
            self.clear()
        with self._lock:
            self._in_step = True
            self._prefetch.expect(backward_order)
            self._held = {n: held for n, held in self._held.items() if not held.expired()}
            self._account.begin(self._statistics())

    @contextmanager
    def forward(self, key: Hashable, kind: Hashable = None, *, at_once: bool) -> Iterator[None]:
        """Around one forward pass of a program.

        Args:
            key: names it, and its backward pass.
            kind: passes of one kind save the same amount.
            at_once: whether its backward pass is the next thing to come: its end then stays.
        """
        self._open(key, kind, at_once=at_once)
        self._enter_hooks()
        try:
            yield
        finally:
            self._contexts.pop().__exit__(None, None, None)
        self._scope.complete = True
        self._expected[kind] = self._scope.nbytes

    def backward(self, key: Hashable) -> None:
        """The backward pass of `key` begins."""
        with self._lock:
            self._account.phases.at("backward", self._busy_s)
            self._prefetch.backward(key)
            self._prefetch.advance(self._amount.ahead_bytes)
            self._tidy()

    def end_step(self) -> OffloadReport:
        """A step ends: adapt the amount to what was measured. Returns what it has sent."""
        with self._lock:
            self._tidy()
            store = self._statistics()
            largest = max(self._expected.values(), default=0)
            seen = self._account.measured(store, largest)
            self.last_step = self._account.report(seen, self._amount, store, self.fault)
            self._amount = next_amount(self._amount, seen, self._bounds)
            self._in_step = False
            if self._store is not None:
                self._store.trim()
            return self.last_step

    def clear(self) -> None:
        """Forget all that is stored: the step that stored it is given up. Its graphs cannot be used."""
        with self._lock:
            for record in list(self._records.values()):
                if record.copy is not None or record.ahead:
                    self._dead.append(record.remains())
                record.clear()
            self._records.clear()
            self._prefetch.expect(())
            self._settle()

    def stop(self, reason: str) -> None:
        """Send nothing from now on."""
        self._stopped = reason
        self._tell()

    @property
    def fault(self) -> str:
        """Why less is sent than could be; empty while all is well."""
        return self._stopped or ("" if self._store is None else self._store.fault)

    def settle(self) -> None:
        """Wait until all that is on its way out is out, and its memory free."""
        with self._lock:
            self._settle()

    def close(self) -> None:
        """End all transfers and give the room back; what is away is lost. Again is harmless."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()

    def _settle(self) -> None:
        while self._leaving or self._dead:
            self._tidy()
            if self._leaving or self._dead:
                sleep(_POLL_S)

    def _open(self, key: Hashable, kind: Hashable, *, at_once: bool) -> None:
        with self._lock:
            self._scope, self._kind, self._at_once = self._prefetch.open(key), kind, at_once

    def _enter_hooks(self) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._contexts.append(hooks)

    def _pack(self, tensor: Tensor) -> Saved | Kept:
        if tensor.is_leaf and tensor.requires_grad:
            return Kept(tensor, tensor._version)
        storage = movable_storage(tensor, self._smallest)
        if storage is None:
            return Kept(tensor.detach(), tensor._version)
        with self._lock:
            self._account.phases.at("forward", self._busy_s)
            self._tidy_at_times()
            if not self._reaches(tensor.device) or storage._cdata in self._held:
                return Kept(tensor.detach(), tensor._version)
            record = self._records.get(storage._cdata)
            if record is None or not record.describes(tensor._version):
                record = self._record(tensor, storage)
            return Saved.of(tensor, record)

    def _unpack(self, saved: Saved | Kept) -> Tensor:
        if isinstance(saved, Kept):
            saved.check()
            return saved.tensor
        with self._lock:
            self._account.phases.at("backward", self._busy_s)
            record = saved.record
            record.check()
            self._prefetch.asked(record)
            if not self._is_here(record):
                self._bring(record)
            elif not record.asked and record in self._leaving:
                self._account.forwarded_bytes += record.nbytes
            record.asked = True
            self._prefetch.advance(self._amount.ahead_bytes)
            self._tidy_at_times()
            return saved.tensor()

    def _reaches(self, device: torch.device) -> bool:
        """Whether tensors of this device can be sent: those of the first that is met."""
        if self._store is None:
            self._device = device
            if self._file is None:
                self._store = HostStore(device, limit_bytes=self._limit)
            elif device.type == "cpu":
                self._store = DiskStore(self._file)
            else:
                self._store = StagedStore(self._file, device, staging_bytes=self._staging)
        return device == self._device

    def _record(self, tensor: Tensor, storage: torch.UntypedStorage) -> Record:
        """A storage that is saved for the first time: sent out if it is to be."""
        record = Record(tensor, storage, self._dead)
        self._records[storage._cdata] = record
        self._scope.add(record)
        self._pace.note(self._device)
        self._account.eligible_bytes += record.nbytes
        if not self._stopped and self._is_wanted(record.nbytes):
            self._send(record)
        return record

    def _is_wanted(self, nbytes: int) -> bool:
        """Whether the amount has room for the storage that was added last."""
        stays_from = self._expected.get(self._kind, 0) - self._amount.tail_bytes
        if self._at_once and self._kind in self._expected and self._scope.nbytes > stays_from:
            return False
        self._credit += nbytes * self._amount.share
        if self._credit < nbytes - 0.5:
            return False
        self._credit = min(self._credit - nbytes, nbytes)
        return True

    def _send(self, record: Record) -> None:
        assert self._store is not None
        assert record.memory is not None
        if not self._fits(record.nbytes):
            self._tidy()
        while not self._fits(record.nbytes) and self._pace.is_ahead():
            self._poll()
        if not self._fits(record.nbytes):
            return
        copy = self._store.put(record.memory)
        while copy is None and not self._store.fault and self._pace.is_ahead():
            self._poll()
            copy = self._store.put(record.memory)
        if copy is None:
            self._tell()
            return
        record.copy = copy
        self._leaving.append(record)
        self._leaving_bytes += record.nbytes
        self._account.sent_bytes += record.nbytes

    def _fits(self, nbytes: int) -> bool:
        most = self._amount.window_bytes
        return not self._leaving_bytes or self._leaving_bytes + nbytes <= most

    def _poll(self) -> None:
        sleep(_POLL_S)
        self._tidy()

    def _tidy_at_times(self) -> None:
        """`_tidy`, unless it has only just been: most tensors are saved in the wake of another."""
        now = perf_counter()
        if now >= self._tidied_s + _TIDY_S:
            self._tidied_s = now
            self._tidy()

    def _tidy(self) -> None:
        """Free what has left, and the room of what nobody needs any more."""
        idle = not (self._leaving or self._dead or self._prefetch.ahead_bytes)
        if self._store is None or idle:
            return
        self._store.advance()
        leaving, self._leaving, self._leaving_bytes = self._leaving, [], 0
        for record in leaving:
            copy = record.copy
            if copy is None:
                continue
            if copy.failed is not None:
                self._dead.append(record.remains())
                self._tell()
            elif not copy.source_free:
                self._leaving.append(record)
                self._leaving_bytes += record.nbytes
            elif not record.asked:
                record.let_go()
        for _ in range(len(self._dead)):
            dead = self._dead.popleft()
            self._prefetch.ahead_bytes -= dead.ahead_bytes
            dead.ahead_bytes = 0
            if dead.copy is not None and not dead.copy.release():
                self._dead.append(dead)

    def _fetch(self, record: Record) -> bool | None:
        if self._is_here(record):
            record.asked = True
            return None
        return record.copy is not None and record.copy.fetch()

    def _is_here(self, record: Record) -> bool:
        """Whether a record is in memory, or still is where it was saved because others hold it."""
        if record.memory is None and record.revive():
            self._hold(record.original)
        return record.memory is not None

    def _bring(self, record: Record) -> None:
        """Wait for a record that is away."""
        assert record.copy is not None
        if self._closed:
            raise OffloadError(
                "the offloader is closed and activations that it took are asked for; close it after "
                "the last backward pass"
            )
        record.copy.fetch()
        self._prefetch.advance(self._amount.ahead_bytes)
        start, queued = perf_counter(), self._pace.mark(self._device)
        record.memory = record.copy.take()
        if is_past(queued):
            self._account.waited_s += perf_counter() - start
        self._dead.append(record.remains())

    def _hold(self, storage: StorageWeakRef) -> None:
        self._held[storage.cdata] = storage

    def _busy_s(self) -> float:
        return self._statistics().busy_s

    def _statistics(self) -> StoreStatistics:
        return StoreStatistics() if self._store is None else self._store.statistics()

    def _tell(self) -> None:
        """Say once that less is sent than could be."""
        if not self.fault or self._told:
            return
        self._told = True
        message = f"activations stay in memory: {self.fault}"
        logger.warning("%s", message)
        if self._on_fault is not None:
            self._on_fault(message)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
