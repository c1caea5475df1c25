"""The exchange of gradients: sums travel to their owners, and reduced gradients to followers.

A bucket leaves when the last contribution of the step to it is in, while the backward pass goes on
with the layers above (as in Li et al. 2020, PyTorch Distributed, section 3.2.3). Two threads of
each rank do it: one sends, the other adds what arrives to a copy of this rank's own sums, bucket by
bucket in one order. So sums never change by being exchanged, an interrupted step keeps them, and
the order of additions does not depend on what arrives first. Exact-mode safe; in fast mode the
bits depend on the ranks only.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.parallel.comm import REDUCTION, SHADOW_GRADIENTS, Communicator, Handle
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.exchange.arrival import Arrival
from holdfast.parallel.optimizer.exchange.buckets import Bucket, OwnedBucket, Routes
from holdfast.parallel.optimizer.exchange.followers import FollowerRoutes
from holdfast.parallel.optimizer.exchange.readiness import Readiness
from holdfast.parallel.optimizer.exchange.wire import Wire, in_one
from holdfast.parallel.optimizer.flat_values import FlatValues
from holdfast.parallel.plan import MESSAGES_AHEAD, RECEIVED_BYTES, STAGED_BYTES


class GradientExchange:
    """One rank's part in the exchange of gradients, one step at a time.

    The training thread calls `begin`, `complete` and `finish` in turn, or `close` after an abort.
    It has an attribute for each part that the two threads share: the routes, the sums and the
    gradients between which it works, the wire, the readiness, and what the step has come to so far.
    """

    def __init__(
        self,
        found: Routes,
        accumulator: GradientAccumulator,
        gradients: FlatValues,
        comm: Communicator,
        wire: Wire,
        *,
        overlap: bool,
    ) -> None:
        """Nothing is sent yet.

        Args:
            accumulator: has this rank's own sums, which stay as they are.
            gradients: those of the owned blocks, flat, to be filled.
            overlap: whether buckets leave while gradients are computed; False: all at the end.
        """
        self._routes, self._accumulator, self._gradients = found, accumulator, gradients
        self._comm, self._wire, self._overlap = comm, wire, overlap
        self._device = accumulator.sums.device
        self._ready = Readiness(self._device)
        self._follows: tuple[FollowerRoutes, FlatValues] | None = None
        self._threads: list[threading.Thread] = []
        self._ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._following: list[Arrival] = []
        self._squares = [0.0] * len(found.owned)
        self._flags: set[int] = set()
        self._sending: Callable[[], None] = lambda: None

    def follow(self, routes: FollowerRoutes, gradients: FlatValues) -> None:
        """Send reduced gradients to followers too, and receive those of followed blocks. Local.

        Args:
            gradients: the flat gradients of this rank's followed blocks, to be filled.
        """
        self._follows = routes, gradients

    @property
    def _has_peers(self) -> bool:
        follows = self._follows is not None and (
            self._follows[0].receives or any(self._follows[0].sends.values())
        )
        return bool(
            follows or self._routes.others or any(m.contributors for m in self._routes.mine)
        )

    def begin(self, sending: Callable[[], None]) -> None:
        """Begin a step; sums of nothing are complete. Local; does not wait.

        Args:
            sending: called in another thread once the first sums are on their way.
        """
        assert not self._threads, "the exchange before has not ended"
        self._ready.begin()
        self._flags.clear()
        self._sending = sending
        if self._overlap and self._has_peers:
            self._start()

    def complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """The sums of these parameters are complete on this rank. From any thread."""
        self._ready.complete(parameters)

    def finish(self) -> tuple[list[float], int]:
        """Wait until all gradients that this rank owns or follows are here.

        Collective over the ranks that hold a use of a block, and followers. All sums are complete.

        Returns:
            The sum of squares of each owned block, in float64, and flags (integer overflow).
        Raises:
            PeerLost: a peer is gone.
        """
        if not self._has_peers:
            self._complete_owned()
            return self._squares, self._all_flags
        if not self._threads:
            self._start()
        for _ in self._threads:
            error = self._ends.get()
            if error is not None:
                raise error
        self._join()
        for arrival in self._following:
            arrival.finish()
        self._following.clear()
        return self._squares, self._all_flags

    @property
    def _all_flags(self) -> int:
        return functools.reduce(int.__or__, self._flags, 0)

    def close(self) -> None:
        """Wait for the threads, which end by themselves once the communicators are aborted."""
        self._ready.cancel()
        self._join()
        self._following.clear()
        self._ends = queue.SimpleQueue()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _start(self) -> None:
        if self._follows is not None:
            routes, gradients = self._follows
            self._following = [
                Arrival(
                    self._comm,
                    owner,
                    SHADOW_GRADIENTS.tag(row),
                    [gradients.parts(spans)],
                )
                for owner, row, spans in routes.receives
            ]
        for name, part in (("out", self._send), ("in", self._complete_owned)):
            thread = threading.Thread(
                target=self._run, args=(part,), name=f"holdfast-gradients-{name}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _run(self, part: Callable[[], None]) -> None:
        error: BaseException | None = None
        try:
            with torch.no_grad(), beside(self._device):
                part()
        except BaseException as caught:
            error = caught
        self._ends.put(error)

    def _send(self) -> None:
        """Send every bucket to its owner, in the order of the routes."""
        sent: deque[tuple[Handle, int]] = deque()
        staged = 0
        for bucket in self._routes.others:
            self._ready.wait(bucket.parameters)
            own, is_view = self._own_sums(bucket)
            message = self._wire.encode(own)
            size = 0 if message is own and is_view else message.nbytes
            while sent and staged + size > STAGED_BYTES:
                handle, freed = sent.popleft()
                handle.wait()
                staged -= freed
            sent.append((self._comm.send(message, bucket.owner, REDUCTION.tag(bucket.row)), size))
            staged += size
            if bucket is self._routes.others[0]:
                self._sending()
        for handle, _ in sent:
            handle.wait()

    def _own_sums(self, bucket: Bucket) -> tuple[Tensor, bool]:
        """This rank's own sums of a bucket, flat, and whether they are a view of all sums."""
        uses = [self._accumulator.parts(spans) for spans in bucket.uses]
        total = in_one(uses[0])
        if len(uses) == 1:
            return total, len(uses[0]) == 1
        total = total.clone() if len(uses[0]) == 1 else total
        self._flags.add(self._accumulator.add_to(total, in_one(uses[1])))
        return total, False

    def _no_sums(self, owned: OwnedBucket) -> tuple[Tensor, bool]:
        """The sums of a bucket of which this rank has none: zeros, as of `_own_sums`."""
        sums = self._accumulator.sums
        return torch.zeros(owned.bucket.elements, dtype=sums.dtype, device=sums.device), False

    def _complete_owned(self) -> None:
        """Complete the gradient of every owned block, and hand it to its followers."""
        arrivals = [(m, peer) for m in self._routes.mine for peer in m.contributors]
        waiting = deque(arrivals)
        posted: deque[tuple[Handle, Tensor]] = deque()
        asked = 0

        def post() -> None:
            """Ask for further messages, up to a number of bytes."""
            nonlocal asked
            while waiting and (len(posted) < MESSAGES_AHEAD or asked < RECEIVED_BYTES):
                owned, peer = waiting.popleft()
                message = self._wire.buffer(owned.bucket.elements)
                tag = REDUCTION.tag(owned.bucket.row)
                posted.append((self._comm.receive(message, peer, tag), message))
                asked += message.nbytes

        post()
        handed: list[Handle] = []
        for owned in self._routes.mine:
            self._ready.wait(owned.bucket.parameters)
            own, is_view = self._no_sums(owned) if owned.is_guest else self._own_sums(owned.bucket)
            total = torch.empty_like(own) if is_view and owned.contributors else own
            for _ in owned.contributors:
                handle, message = posted.popleft()
                handle.wait()
                self._flags.add(self._wire.add(message, own, total))
                own = total
                asked -= message.nbytes
                post()
            self._convert(owned, total)
            handed += self._hand_on(owned)
        for handle in handed:
            handle.wait()

    def _convert(self, owned: OwnedBucket, total: Tensor) -> None:
        start = 0
        for number, block in enumerate(owned.bucket.blocks, owned.begin):
            stop = start + block.elements
            gradient = self._gradients.part(owned.start + start, owned.start + stop)
            self._squares[number] = self._accumulator.read(total[start:stop], gradient)
            start = stop

    def _hand_on(self, owned: OwnedBucket) -> Iterator[Handle]:
        """Send the reduced gradients of a bucket to the followers of its blocks."""
        if self._follows is None:
            return
        row, gradients = owned.bucket.row, self._gradients
        for follower, spans in self._follows[0].sends[row]:
            message = in_one(gradients.parts(spans))
            yield self._comm.send(message, follower, SHADOW_GRADIENTS.tag(row))


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Work on a stream of its own beside the computing one; at the end the host waits for it."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
