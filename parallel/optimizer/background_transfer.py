"""Background transfer of optimizer state to joining ranks, paused at every commit vote.

State does not change between two updates, so it can be read while gradients are computed. From the
beginning of a step until its vote, a thread sends blocks; the rest follows after the next update. A
rank enters the vote only when it has sent, or received, every transfer that was begun. A rank that
has received a block holds its owner's state, and follows its updates as a shadow does. Updates to
blocks that have not arrived have no effect: the arriving state overwrites them. Exact-mode safe.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol

from holdfast.parallel.comm import BACKGROUND_TRANSFER, Communicator, FlightRecorder, Handle
from holdfast.parallel.optimizer.rules import StateFormat
from holdfast.parallel.optimizer.transfer_messages import BlockMessages, BlockState, is_pause
from holdfast.parallel.plan import BlockKey, BlockTransfer

_WINDOW = 2
"""The block transfers that a rank has on their way at once."""


def in_turn(block_transfers: Sequence[BlockTransfer]) -> list[BlockTransfer]:
    """The same transfers in turns over pairs of ranks, so that no rank waits for long. Pure."""
    before: Counter[tuple[int, int]] = Counter()
    places = []
    for transfer in block_transfers:
        pair = transfer.source, transfer.target
        places.append(before[pair])
        before[pair] += 1
    order = sorted(range(len(block_transfers)), key=lambda n: (places[n], n))
    return [block_transfers[n] for n in order]


class TransferPace(Protocol):
    """Decides at each vote whether a transfer must end there, or may."""

    def must_end(self) -> bool | None:
        """Whether all must have arrived at this vote, in a run that is repeated; otherwise None."""
        ...

    def may_end(self) -> bool:
        """Whether ranks can agree on the next plan now; asked once all has arrived."""
        ...


class BackgroundTransfer:
    """One rank's part in a background transfer.

    The training thread calls `start` and `pause` in turn. All ranks call `pause` in the same step.
    """

    def __init__(
        self,
        block_transfers: Sequence[BlockTransfer],
        rank: int,
        comm: Communicator,
        read: Callable[[BlockKey], BlockState],
        write: Callable[[BlockKey, BlockState], None],
        *,
        form: StateFormat,
        recorder: FlightRecorder,
        pace: TransferPace,
    ) -> None:
        """Nothing is sent yet.

        Args:
            block_transfers: the transfers of all ranks, equal on all. Every rank processes its own
                in the order of `in_turn`, so that none waits in a circle.
            comm: carries CPU tensors; nothing else uses it.
            read: returns a held block's state.
            write: stores a block's state, which lies in CPU memory that is not used again.
            pace: asked at each vote.
        """
        self._rank, self._recorder = rank, recorder
        self._messages = BlockMessages(comm, form, BACKGROUND_TRANSFER)
        self._read, self._write = read, write
        self._left = [
            (n, p) for n, p in enumerate(in_turn(block_transfers)) if rank in (p.source, p.target)
        ]
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pace = pace

    def start(self, begun: Callable[[], None] = lambda: None) -> None:
        """Begin to transfer; state must not change until `pause` has returned.

        Local; does not wait.

        Args:
            begun: called in another thread once a transfer is on its way.
        """
        if self._thread is None and self._left:
            self._stopping.clear()
            self._thread = threading.Thread(
                target=self._run, args=(begun,), name="holdfast-background-transfer", daemon=True
            )
            self._thread.start()

    def pause(self) -> bool:
        """Wait until no transfer is under way.

        Returns whether this rank is ready for the next plan.

        It is ready when it has sent and received all of its transfers.

        Raises:
            PeerLost: a peer is gone, or its state arrived damaged.
        """
        must_end = self._pace.must_end()
        if not must_end:
            self._stopping.set()
        since = perf_counter()
        self.close()
        self._recorder.blocked_s += perf_counter() - since
        if self._error is not None:
            raise self._error
        if must_end is not None:
            return must_end and not self._left
        return not self._left and self._pace.may_end()

    def close(self) -> None:
        """Wait for the thread, which ends by itself once the communicators are aborted."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, begun: Callable[[], None]) -> None:
        try:
            self._go_on(begun)
        except BaseException as error:
            self._error = error

    def _go_on(self, begun: Callable[[], None]) -> None:
        """Send and receive until done or paused: at least one transfer of each pair of ranks."""
        done: set[int] = set()
        advanced: set[int] = set()
        paused: set[int] = set()
        sent: deque[list[Handle]] = deque()
        for number, transfer in self._left:
            sends = transfer.source == self._rank
            peer = transfer.target if sends else transfer.source
            if peer in paused:
                continue
            if sends and peer in advanced and self._stopping.is_set():
                sent.append([self._messages.send_pause(number, peer)])
                paused.add(peer)
                continue
            if sends:
                sent.append(self._messages.send(number, transfer, self._read))
                if len(sent) > _WINDOW:
                    _wait(sent.popleft())
            elif not self._receive(number, transfer):
                paused.add(peer)
                continue
            if not done:
                begun()
            advanced.add(peer)
            done.add(number)
        for handles in sent:
            _wait(handles)
        self._left = [(n, p) for n, p in self._left if n not in done]

    def _receive(self, number: int, transfer: BlockTransfer) -> bool:
        """Receive a transfer; False if its source will send it after the vote."""
        handle, checksum = self._messages.receive_checksum(number, transfer)
        handle.wait()
        if is_pause(checksum):
            return False
        handle, content = self._messages.receive_content(number, transfer)
        handle.wait()
        for key, state in self._messages.unpacked(transfer, content, checksum):
            self._write(key, state)
        return True


def _wait(handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.wait()
