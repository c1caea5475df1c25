"""Memory that the ranks of one node share while loading: one rank fills it, the others copy.

Each rank owns two slots and a page of counters that only it writes, so no lock is needed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from holdfast.parallel.errors import CheckpointError, PeerLost, shown

_PAGE = 4096
_FILLED, _FAILED, _ATTACHED, _FIRST_CONSUMED = 0, 1, 2, 8
_PAUSE_S = 0.0002
_LOOK_FOR_S = 0.002
_LOOK_S = 0.5
"""The interval at which a waiting rank checks that the others are alive, in seconds."""


@dataclass(frozen=True, slots=True)
class NodeMeeting:
    """The means by which the ranks of a node meet to load together."""

    store: Store
    name: str
    """The name of this load, never used before on this store."""
    timeout_s: float = 600.0
    """The longest wait for another rank, in seconds."""
    check: Callable[[], None] = field(default=lambda: None)
    """A function called while waiting; an exception from it ends the wait."""
    number: Callable[[int], int] = int
    """Returns the number that a rank has in its run, for messages."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class NodeMemory:
    """This rank's view of all ranks' slots. Collective over the ranks of a node."""

    def __init__(
        self, meeting: NodeMeeting, rank: int, peers: Sequence[int], slot_bytes: int
    ) -> None:
        """Make this rank's slots, and map those of the others.

        Args:
            meeting: equal on all ranks of the node.
            peers: all ranks of the node, this one included; equal on all ranks.
            slot_bytes: the size of a slot; equal on all ranks, rounded up to whole pages.
        """
        self.rank, self.peers = rank, tuple(peers)
        self._index = {peer: place for place, peer in enumerate(self.peers)}
        self._meeting = meeting
        self.slot_bytes = -(-max(slot_bytes, 1) // _PAGE) * _PAGE
        counters = -(-8 * (_FIRST_CONSUMED + len(peers)) // _PAGE) * _PAGE
        self._data = counters
        self._store = PrefixStore(f"load/{meeting.name}", meeting.store)
        size = counters + 2 * self.slot_bytes
        own = os.memfd_create(f"holdfast-load-{rank}")
        os.ftruncate(own, size)
        self._store.set(f"memory/{rank}", f"{os.getpid()} {own}")
        self._pids: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._counters: dict[int, memoryview] = {}
        try:
            for peer in self.peers:
                self._attach(peer, own, size, counters)
            self._counters[rank][_ATTACHED] = 1
            for peer in self.peers:
                self._wait_until(peer, _ATTACHED, 1)
        finally:
            # Every rank has mapped it, or the load has failed.
            os.close(own)

    def _attach(self, peer: int, own: int, size: int, counters: int) -> None:
        meeting, key = self._meeting, f"memory/{peer}"
        give_up = meeting.clock() + meeting.timeout_s
        while not self._store.check([key]):
            meeting.check()
            if meeting.clock() > give_up:
                raise PeerLost(
                    f"{self._name(peer)} did not begin to load within {meeting.timeout_s:g} s"
                )
            meeting.sleep(_LOOK_FOR_S)
        text = self._store.get(key).decode(errors="replace")
        found = re.fullmatch(r"(\d{1,10}) (\d{1,10})", text, re.ASCII)
        if found is None:
            raise PeerLost(f"{self._name(peer)} tells {shown(text)} of its memory")
        self._pids[peer] = pid = int(found[1])
        descriptor = int(found[2])
        opened = own if peer == self.rank else _open_of(pid, descriptor, self._name(peer))
        try:
            self._maps[peer] = mmap.mmap(opened, size)
        except (OSError, ValueError) as error:
            raise PeerLost(f"memory of {self._name(peer)} cannot be used: {error}") from error
        finally:
            if opened != own:
                os.close(opened)
        self._counters[peer] = memoryview(self._maps[peer])[:counters].cast("q")

    def slot(self, reader: int, number: int) -> Tensor:
        """The memory of a reader's load: uint8[slot_bytes], page-aligned."""
        begin = self._data + number % 2 * self.slot_bytes
        whole = torch.frombuffer(self._maps[reader], dtype=torch.uint8)
        return whole[begin : begin + self.slot_bytes]

    def wait_free(self, number: int, receivers: Iterable[int]) -> None:
        """As a reader, wait until `receivers` have taken their boxes of load `number` - 2."""
        for peer in receivers:
            self._wait_until(peer, _FIRST_CONSUMED + self._index[self.rank], number - 1)

    def publish(self, number: int) -> None:
        """As a reader, publish load `number`, which lies in its slot."""
        self._counters[self.rank][_FILLED] = number + 1

    def wait_filled(self, reader: int, number: int) -> None:
        """As a receiver, wait until a reader has published load `number`."""
        self._wait_until(reader, _FILLED, number + 1)

    def took(self, reader: int, number: int) -> None:
        """As a receiver, say that load `number` of a reader is no longer needed here."""
        self._counters[self.rank][_FIRST_CONSUMED + self._index[reader]] = number + 1

    def report_failure(self, reason: str) -> None:
        """Tell the node that this rank cannot go on."""
        self._store.set(f"failed/{self.rank}", reason)
        self._counters[self.rank][_FAILED] = 1

    def close(self) -> None:
        """Unmap the memory; tensors that were handed out must not be in use any more. Local."""
        self._store.delete_key(f"memory/{self.rank}")
        for view in self._counters.values():
            view.release()
        self._counters.clear()
        for mapped in self._maps.values():
            # A tensor that still uses the memory keeps it mapped until the tensor is gone.
            with contextlib.suppress(BufferError):
                mapped.close()
        self._maps.clear()

    def _wait_until(self, peer: int, counter: int, value: int) -> None:
        counters, meeting = self._counters[peer], self._meeting
        if counters[counter] >= value:
            return
        now = meeting.clock()
        give_up, look = now + meeting.timeout_s, now + _LOOK_S
        while counters[counter] < value:
            meeting.sleep(_PAUSE_S)
            now = meeting.clock()
            if any(self._counters[p][_FAILED] for p in self.peers):
                self._raise_failure()
            if now > look:
                look = now + _LOOK_S
                meeting.check()
                _check_alive(self._pids[peer], self._name(peer))
            if now > give_up:
                raise PeerLost(
                    f"{self._name(peer)} did not go on with loading for {meeting.timeout_s:g} s"
                )

    def _name(self, peer: int) -> str:
        return f"rank {self._meeting.number(peer)}"

    def _raise_failure(self) -> None:
        for peer in self.peers:
            if self._counters[peer][_FAILED]:
                raise CheckpointError(self._store.get(f"failed/{peer}").decode())


def _open_of(pid: int, descriptor: int, peer: str) -> int:
    try:
        return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
    except OSError as error:
        raise PeerLost(
            f"memory of {peer} cannot be shared with this process ({error.strerror}); ranks "
            "that the launcher puts on one node must see each other's /proc"
        ) from error


def _check_alive(pid: int, peer: str) -> None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        raise PeerLost(f"{peer} died while loading a checkpoint") from None
