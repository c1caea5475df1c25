"""The offloader: sends what autograd saves to an SSD or host memory, and back in time.

The method is SSDTrain's (Wu et al. 2024), with torch's saved-tensor hooks alone: no patched
modules, any device, any graph. Exact-mode safe: restored tensors have the same bits and the same
alignment.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from holdfast.parallel.errors import ConfigError, OffloadError, number_fault
from holdfast.parallel.offload.hooks.account import Account, EndedStep
from holdfast.parallel.offload.hooks.device_store import DeviceStore
from holdfast.parallel.offload.hooks.eligibility import movable_storage
from holdfast.parallel.offload.hooks.fault_notice import FaultNotice
from holdfast.parallel.offload.hooks.outgoing import Outgoing
from holdfast.parallel.offload.hooks.pace import Pace, end_of_queue
from holdfast.parallel.offload.hooks.prefetch import Prefetch, Scope
from holdfast.parallel.offload.hooks.record import Kept, Record, SavedView
from holdfast.parallel.offload.hooks.selection import Selection
from holdfast.parallel.offload.policy import Bounds, Moment, OffloadReport, Phase
from holdfast.parallel.offload.stores import StoreStatistics

_POLL_S = 5e-5
_MOST_BYTES = 1 << 62
_TIDY_S = 1e-3
"""The least time in seconds between two clean-ups: writing a MiB takes longer."""


class Offloader:
    """Moves saved tensors out of memory between the forward and the backward pass. Local.

    Use it as a context around forward passes and, optionally, their backward passes::

        offloader = Offloader("/nvme")
        for batch in batches:
            with offloader:
                model(batch).backward()

    A step ends when the outermost context is left; the amount to send is then adapted. These stay
    in memory: leaves that require gradients, views of them, what `keep` names, storages below
    `smallest_bytes`, what the drive is too slow for, and what other references hold anyway. A
    storage is sent once, however many tensors on it are saved. Changes that autograd is not told of
    (`.data`) are not noticed.

    It has more attributes than most classes here: it is the one object that both hooks of autograd
    share, and each attribute is one part of the work (room, selection, outgoing, prefetch,
    account).
    """

    last_step: OffloadReport = OffloadReport()
    """The report of the last ended step: what was sent, read and waited for."""

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
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Make an offloader; nothing is allocated before the first tensor is saved.

        Args:
            path: a folder on the drive; None: host memory (pinned, of use on a GPU only).
            limit_bytes: the most bytes that are away at once; 0: no limit.
            smallest_bytes: smaller storages stay in memory.
            bounds: the limits of the share of the activations that is sent; equal limits fix it.
                None: from 0 to 1.
            bytes_per_s: the highest rate to and from the drive; 0: no limit.
            staging_bytes: host memory between a GPU and the drive, in bytes; 1 GiB at most.
            on_fault: called once, with the reason, when less is sent from then on.
            waiting: a context for work that lasts as long as the drive takes.
        Raises:
            ConfigError: a number is out of its range, or the folder does not allow a file to be
                made.
        """
        for name, number, whole in (
            ("limit_bytes", limit_bytes, True),
            ("smallest_bytes", smallest_bytes, True),
            ("bytes_per_s", bytes_per_s, False),
            ("staging_bytes", staging_bytes, True),
        ):
            if fault := number_fault(name, number, 0, _MOST_BYTES, whole=whole):
                raise ConfigError(fault)
        self._smallest = smallest_bytes
        self._room = DeviceStore(
            path, limit_bytes=limit_bytes, bytes_per_s=bytes_per_s, staging_bytes=staging_bytes
        )
        weakref.finalize(self, self._room.close)
        self._notice, self._stopped = FaultNotice(on_fault), ""
        self._waiting = waiting
        self._lock = threading.RLock()
        self._records: weakref.WeakValueDictionary[int, Record] = weakref.WeakValueDictionary()
        self._held: dict[int, StorageWeakRef] = {}
        """Storages that others hold, so that sending them frees no memory."""
        self._outgoing = Outgoing()
        self._prefetch = Prefetch(self._fetch)
        self._scope = Scope(None)
        self._selection = Selection(bounds or Bounds())
        self._pace = Pace()
        self._contexts: list[AbstractContextManager[Any]] = []
        self._account = Account()
        self._ended: deque[EndedStep] = deque()
        """Steps that the amount is not adapted to yet: a GPU was not at their end."""
        self._in_step = False
        self._tidied_s = 0.0

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
            self._selection.complete(None, self._scope.nbytes)
            self.end_step()

    def begin_step(self, backward_order: Iterable[Hashable] = ()) -> None:
        """Begin a step of a program. A step that has not ended is given up, as by `cancel`.

        Args:
            backward_order: the keys of the step's forward passes, in the order of their backward
                passes.
        """
        if self._in_step:
            self.cancel()
        with self._lock:
            self._in_step = True
            self._prefetch.expect(backward_order)
            self._held = {n: held for n, held in self._held.items() if not held.expired()}
            self._adapt()
            self._account.begin(self._statistics())

    @contextmanager
    def forward(self, key: Hashable, kind: Hashable = None, *, at_once: bool) -> Iterator[None]:
        """A context around one forward pass of a program.

        Args:
            key: the name of the pass and of its backward pass.
            kind: passes of one kind save the same amount.
            at_once: whether its backward pass follows directly; the end of the pass then stays.
        """
        self._open(key, kind, at_once=at_once)
        self._enter_hooks()
        try:
            yield
        finally:
            self._contexts.pop().__exit__(None, None, None)
        self._scope.complete = True
        self._selection.complete(kind, self._scope.nbytes)

    def backward(self, key: Hashable) -> None:
        """Begin the backward pass of `key`."""
        with self._lock:
            self._note("backward")
            self._prefetch.backward(key)
            self._prefetch.advance(self._selection.amount.ahead_bytes)
            self._tidy()

    def end_step(self) -> OffloadReport:
        """End a step; the amount is adapted once its times are known. Returns its report."""
        with self._lock:
            self._tidy()
            store = self._statistics()
            selection = self._selection
            seen = self._account.ended(
                selection.amount, store, selection.largest_bytes, self._moment()
            )
            self.last_step = self._account.report(seen, store, self.fault)
            self._ended.append(seen)
            self._adapt()
            self._in_step = False
            if self._room.store is not None:
                self._room.store.trim()
            return self.last_step

    def cancel(self) -> None:
        """Give up the step under way and forget what it stored; return when nothing reads it.

        The step's graphs cannot be used any more.
        """
        with self._lock:
            for record in list(self._records.values()):
                if record.copy is not None or record.ahead:
                    self._outgoing.dead.append(record.remains())
                record.clear()
            self._records.clear()
            self._prefetch.expect(())
            with self._waiting():
                self._drain()

    def abort(self, reason: str) -> None:
        """Send nothing from now on; sent tensors still come back. From any thread; never blocks."""
        self._stopped = reason
        self._notice.tell(self.fault)

    @property
    def fault(self) -> str:
        """Why less is sent than could be; empty while all is well."""
        return self._stopped or self._room.fault

    def drain(self) -> None:
        """Wait until every transfer out has ended and its memory is free."""
        with self._lock, self._waiting():
            self._drain()

    def close(self) -> None:
        """End all transfers and release the room; stored tensors are lost.

        A second call does nothing.
        """
        with self._lock:
            self._room.close()

    def _drain(self) -> None:
        while self._outgoing:
            self._tidy()
            if self._outgoing:
                sleep(_POLL_S)

    def _open(self, key: Hashable, kind: Hashable, *, at_once: bool) -> None:
        with self._lock:
            self._scope = self._prefetch.open(key)
            self._selection.open(kind, at_once=at_once)

    def _enter_hooks(self) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._contexts.append(hooks)

    def _pack(self, tensor: Tensor) -> SavedView | Kept:
        if tensor.is_leaf and tensor.requires_grad:
            return Kept(tensor, tensor._version)
        storage = movable_storage(tensor, self._smallest)
        if storage is None:
            return Kept(tensor.detach(), tensor._version)
        with self._lock:
            reached = self._room.reaches(tensor.device)
            self._note("forward")
            self._tidy_at_times()
            if not reached or storage._cdata in self._held:
                return Kept(tensor.detach(), tensor._version)
            record = self._records.get(storage._cdata)
            if record is None or not record.describes(tensor._version):
                record = self._record(tensor, storage)
            return SavedView.of(tensor, record)

    def _unpack(self, saved: SavedView | Kept) -> Tensor:
        if isinstance(saved, Kept):
            saved.check()
            return saved.tensor
        with self._lock:
            self._note("backward")
            record = saved.record
            record.check()
            self._prefetch.asked(record)
            if not self._is_here(record):
                self._bring(record)
            elif not record.asked and record in self._outgoing:
                self._account.forwarded_bytes += record.nbytes
            record.asked = True
            self._prefetch.advance(self._selection.amount.ahead_bytes)
            self._tidy_at_times()
            return saved.tensor()

    def _record(self, tensor: Tensor, storage: torch.UntypedStorage) -> Record:
        """The record of a storage saved for the first time, which is sent if it is selected."""
        record = Record(tensor, storage, self._outgoing.dead)
        self._records[storage._cdata] = record
        self._scope.add(record)
        self._pace.note(self._room.device)
        self._account.eligible_bytes += record.nbytes
        if not self._stopped and self._selection.wants(record.nbytes, self._scope.nbytes):
            self._send(record)
        return record

    def _send(self, record: Record) -> None:
        store = self._room.store
        assert store is not None
        assert record.memory is not None
        if not self._fits(record.nbytes):
            self._tidy()
        while not self._fits(record.nbytes) and self._pace.is_ahead():
            self._poll()
        if not self._fits(record.nbytes):
            return
        with self._waiting():  # for room, and for a place in the drive's queue
            copy = store.put(record.memory)
            while copy is None and not store.fault and self._pace.is_ahead():
                self._poll()
                copy = store.put(record.memory)
        if copy is None:
            self._notice.tell(self.fault)
            return
        self._outgoing.add(record, copy)
        self._account.sent_bytes += record.nbytes

    def _fits(self, nbytes: int) -> bool:
        return self._outgoing.fits(nbytes, self._selection.amount.window_bytes)

    def _poll(self) -> None:
        sleep(_POLL_S)
        self._tidy()

    def _tidy_at_times(self) -> None:
        """Call `_tidy` unless it ran a moment ago: tensors are often saved in quick succession."""
        now = perf_counter()
        if now >= self._tidied_s + _TIDY_S:
            self._tidied_s = now
            self._tidy()

    def _tidy(self) -> None:
        """Free the memory of sent storages, and the room of storages that no graph needs."""
        if self._room.store is None or not (self._outgoing or self._prefetch.ahead_bytes):
            return
        self._room.store.advance()
        if self._outgoing.free_sent():
            self._notice.tell(self.fault)
        self._prefetch.ahead_bytes -= self._outgoing.release_dead()

    def _fetch(self, record: Record) -> bool | None:
        if self._is_here(record):
            record.asked = True
            return None
        if record.copy is None:
            return False
        with self._waiting():  # for a place in the drive's queue
            return record.copy.fetch()

    def _is_here(self, record: Record) -> bool:
        """Whether a record is in memory, or still where it was saved because others hold it."""
        if record.memory is None and record.revive():
            self._hold(record.original)
        return record.memory is not None

    def _bring(self, record: Record) -> None:
        """Wait until a record that is away is back."""
        assert record.copy is not None
        if self._room.is_closed:
            raise OffloadError(
                "the offloader is closed and activations that it took are asked for; close it "
                "after the last backward pass"
            )
        with self._waiting():
            record.copy.fetch()
        self._prefetch.advance(self._selection.amount.ahead_bytes)
        start, queued = perf_counter(), self._moment()
        with self._waiting():
            record.memory = record.copy.take()
        if queued.query():
            self._account.waited_s += perf_counter() - start
        self._outgoing.dead.append(record.remains())

    def _moment(self) -> Moment:
        return end_of_queue(self._room.device)

    def _note(self, phase: Phase) -> None:
        self._account.phases.at(phase, self._moment, self._room.busy_s)

    def _adapt(self) -> None:
        """Adapt the amount to the last ended step that the device has come to the end of."""
        seen = None
        while self._ended and self._ended[0].phases.is_past:
            seen = self._ended.popleft()
        if seen is not None:
            self._selection.adapt(seen.amount, seen.measured())

    def _hold(self, storage: StorageWeakRef) -> None:
        self._held[storage.cdata] = storage

    def _statistics(self) -> StoreStatistics:
        return self._room.statistics()


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
