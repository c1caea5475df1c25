"""Shared gradients: each micro-batch's gradients travel to the keepers of their blocks at once.

A keeper adds them to the sums of its blocks, in one order over all ranks of its group, in a thread
of its own. Sums are then as if one rank had computed all micro-batches of the group, so exact mode
has the bits of replicas that keep all sums; what travels are the gradients themselves, which are
shorter than integer sums. Exact-mode safe; in fast mode the bits depend on the ranks only.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from holdfast.parallel.comm import CONTRIBUTIONS, Communicator, Handle
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.exchange import beside
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.optimizer.sharding.shares import kept_spans, layer_shares
from holdfast.parallel.optimizer.spans import Span
from holdfast.parallel.plan import (
    MESSAGES_AHEAD,
    Contribution,
    Plan,
    ShardGroup,
    are_aligned,
    contribution_order,
    shard_group,
    shards,
    staged_bytes,
)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements [start, stop) of a parameter."""

    parameter: nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Orders:
    """The contributions of steps with some micro-batches."""

    only: frozenset[int] | None
    """The micro-batches; None: all."""
    of: Mapping[int, tuple[Contribution, ...]]
    """By rank of the group, its contributions in the order in which it sends them."""
    most_bytes: float
    """The bytes on their way to other keepers, at most."""


@dataclass(slots=True)
class _Step:
    """One step of the sharing, as the training thread and the adding thread see it."""

    on_complete: Callable[[Iterable[nn.Parameter]], None]
    on_sending: Callable[[], None]
    thread: threading.Thread | None = None
    """The thread that adds to this rank's sums; None once it has ended."""
    gradients: dict[Contribution, dict[nn.Parameter, list[Tensor]]] = field(default_factory=dict)
    """What has been added of contributions that have not left: a gradient of each slice."""
    next: int = 0
    """The place of the next contribution to leave."""
    sent: deque[tuple[Handle, int]] = field(default_factory=deque)
    staged: int = 0
    """The bytes that are on their way to other keepers."""
    own: dict[int, tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=dict)
    """By place, this rank's own parts that are not in its sums yet."""
    own_bytes: int = 0
    is_cancelled: bool = False
    error: BaseException | None = None
    """Why the adding thread has ended before its time."""
    flags: int = 0


class GradientSharing:
    """One rank's part in its shard group's sums, one step at a time.

    The training thread calls `begin`, `add` and `finish` in turn, or `close` after an abort. It has
    an attribute for each part that a step needs: the shares, the order and the pieces of messages,
    the sums, the connection, and the running step.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        buffer: ParameterBuffer,
        accumulator: GradientAccumulator,
        comm: Communicator,
        dtype: torch.dtype,
    ) -> None:
        """Have `accumulator` keep only this rank's share of sums. Nothing is sent yet.

        Args:
            dtype: that of gradients on the wire.
        """
        self._rank = rank
        self._shares = shares = layer_shares(plan, rank, buffer, "gradients")
        group = shard_group(plan, rank, "gradients")
        largest = max((found.place.elements for found in shares.values()), default=0)
        bound = staged_bytes(largest * dtype.itemsize * len(accumulator.slices.own))
        self._order = partial(_orders, plan, group, bound)
        self._orders = self._order(None)
        """Those of the step, or of the one before."""
        self._accumulator, self._comm, self._dtype = accumulator, comm, dtype
        self._device = buffer.device
        self._layer_of = {p: layer for layer, found in shares.items() for p in found.parameters}
        self._pieces = {
            layer: {
                keeper: tuple(_pieces(buffer, found.parameters, spans))
                for keeper in group.ranks
                if (spans := found.taken(keeper, rank))
            }
            for layer, found in shares.items()
        }
        self._step: _Step | None = None
        self._changed = threading.Condition()
        kept = kept_spans(plan, rank, "gradients")(buffer.segments)
        accumulator.keep(kept, frozenset(self._layer_of))

    def begin(
        self,
        complete: Callable[[Iterable[nn.Parameter]], None],
        sending: Callable[[], None],
        only: frozenset[int] | None = None,
    ) -> None:
        """Begin a step. Local; does not wait.

        Args:
            complete: called with parameters whose kept sums get no more gradients. From any thread.
            sending: called once the first gradients are on their way.
            only: the micro-batches that are computed; None: all.
        """
        before = self._step
        assert before is None or before.thread is None, "the step before has not ended"
        if self._orders.only != only:
            self._orders = self._order(only)
        self._step = step = _Step(complete, sending)
        step.thread = threading.Thread(
            target=self._run, args=(step,), name="holdfast-gradients-shared", daemon=True
        )
        step.thread.start()

    def add(self, micro_batch: int, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a whole local parameter's gradient from a slice, which is not changed any more.

        Raises:
            PeerLost: a keeper is gone.
        """
        step = self._step
        assert step is not None
        layer = self._layer_of[parameter]
        found = step.gradients.setdefault((micro_batch, layer), {})
        found.setdefault(parameter, []).append(gradient.reshape(-1))
        order = self._orders.of[self._rank]
        while step.next < len(order) and self._is_whole(step, order[step.next]):
            contribution = order[step.next]
            self._hand_over(step, contribution[1], step.gradients.pop(contribution, {}))
            step.next += 1

    def _is_whole(self, step: _Step, contribution: Contribution) -> bool:
        shares = self._shares.get(contribution[1])
        wanted = 0 if shares is None else len(shares.parameters) * len(self._accumulator.slices.own)
        return sum(map(len, step.gradients.get(contribution, {}).values())) == wanted

    def _hand_over(
        self, step: _Step, layer: int, found: Mapping[nn.Parameter, Sequence[Tensor]]
    ) -> None:
        """Send a layer's gradients to the other keepers, and keep this rank's own part."""
        size = 1 + max(self._orders.of)
        for keeper, pieces in sorted(
            self._pieces.get(layer, {}).items(), key=lambda item: (item[0] - self._rank - 1) % size
        ):
            parts = [
                found[piece.parameter][number][piece.start : piece.stop]
                for number in range(len(self._accumulator.slices.own))
                for piece in pieces
            ]
            message = torch.cat(parts).to(self._dtype)
            if keeper == self._rank:
                self._keep(step, message)
                continue
            while step.sent and step.staged + message.nbytes > self._orders.most_bytes:
                handle, freed = step.sent.popleft()
                handle.wait()
                step.staged -= freed
            tag = CONTRIBUTIONS.wrapped(step.next)
            step.sent.append((self._comm.send(message, keeper, tag), message.nbytes))
            step.staged += message.nbytes
        if step.next == 0:
            step.on_sending()

    def _keep(self, step: _Step, message: Tensor) -> None:
        mark = None
        if self._device.type == "cuda":
            mark = torch.cuda.Event()
            mark.record(torch.cuda.current_stream(self._device))
        with self._changed:
            most_bytes = self._orders.most_bytes / len(self._orders.of)
            while step.own and step.own_bytes + message.nbytes > most_bytes:
                if step.error is not None:
                    raise step.error
                self._changed.wait()
            step.own[step.next] = message, mark
            step.own_bytes += message.nbytes
            self._changed.notify_all()

    def finish(self) -> int:
        """Wait until all sums that this rank keeps are complete. Collective over the group.

        Returns:
            Flags.
        Raises:
            PeerLost: a peer is gone.
        """
        step = self._step
        assert step is not None
        for handle, _ in step.sent:
            handle.wait()
        step.sent.clear()
        if step.thread is not None:
            step.thread.join()
            step.thread = None
        if step.error is not None:
            raise step.error
        return step.flags

    def close(self) -> None:
        """Wait for the thread, which ends once the communicators are aborted."""
        step = self._step
        if step is None or step.thread is None:
            return
        with self._changed:
            step.is_cancelled = True
            self._changed.notify_all()
        step.thread.join()
        self._step = None

    def _run(self, step: _Step) -> None:
        try:
            with torch.no_grad(), beside(self._device):
                step.flags = self._add_all(step)
        except BaseException as error:
            with self._changed:
                step.error = error
                self._changed.notify_all()

    def _add_all(self, step: _Step) -> int:
        """Add the group's gradients to this rank's sums: by place, then by rank."""
        orders = self._orders.of
        longest = max(map(len, orders.values()), default=0)
        awaited = [
            (place, peer, order[place][1])
            for place in range(longest)
            for peer, order in orders.items()
            if place < len(order) and self._takes(peer, order[place][1])
        ]
        left = Counter(layer for _, _, layer in awaited)
        for layer, found in self._shares.items():
            self._accumulator.clear_kept(found.whole)
            if not left[layer]:
                self._accumulator.clear_kept(found.shares.get(self._rank, ()))
                step.on_complete(found.parameters)
        flags = torch.zeros((), dtype=torch.int64, device=self._device)
        begun: set[int] = set()
        for layer, gradient in self._arriving(step, awaited):
            found = self._shares[layer]
            spans, count = found.shares.get(self._rank, ()), found.elements(self._rank)
            for of_slice in gradient.chunk(len(self._accumulator.slices.own)):
                shared, own = of_slice[:count], of_slice[count:]
                self._accumulator.add_kept(spans, shared, flags, first=layer not in begun)
                if own.numel():
                    self._accumulator.add_kept(found.whole, own, flags, first=False)
                begun.add(layer)
            left[layer] -= 1
            if not left[layer]:
                step.on_complete(self._shares[layer].parameters)
        return int(flags)

    def _takes(self, peer: int, layer: int) -> bool:
        """Whether this rank adds something of a peer's gradients of a layer."""
        shares = self._shares.get(layer)
        return shares is not None and bool(shares.taken(self._rank, peer))

    def _arriving(
        self, step: _Step, awaited: Sequence[tuple[int, int, int]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Each gradient that belongs to this rank's sums, with its layer, in order."""
        ahead = max(MESSAGES_AHEAD, len(self._orders.of))
        posted: deque[tuple[Handle, Tensor]] = deque()
        others = iter([entry for entry in awaited if entry[1] != self._rank])

        def post() -> None:
            for place, peer, layer in others:
                size = self._shares[layer].elements(self._rank) * len(self._accumulator.slices.own)
                message = torch.empty(size, dtype=self._dtype, device=self._device)
                handle = self._comm.receive(message, peer, CONTRIBUTIONS.wrapped(place))
                posted.append((handle, message))
                if len(posted) >= ahead:
                    return

        post()
        for place, peer, layer in awaited:
            if peer == self._rank:
                yield layer, self._take_own(step, place)
                continue
            handle, message = posted.popleft()
            handle.wait()
            post()
            yield layer, message

    def _take_own(self, step: _Step, place: int) -> Tensor:
        with self._changed:
            while place not in step.own:
                if step.is_cancelled:
                    raise PeerLost("the step was interrupted")
                self._changed.wait()
            message, mark = step.own.pop(place)
            step.own_bytes -= message.nbytes
            self._changed.notify_all()
        if mark is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(mark)
            message.record_stream(stream)
        return message


def _orders(plan: Plan, group: ShardGroup, bound: int, only: frozenset[int] | None) -> _Orders:
    """The contributions of a group's ranks.

    Args:
        bound: the bytes on their way at most, where ranks may wait for each other.
    """
    of = {peer: contribution_order(plan, peer, only) for peer in group.ranks}
    return _Orders(only, of, bound if are_aligned(plan, group, only) else float("inf"))


def shared_gradients(
    plan: Plan,
    rank: int,
    buffer: ParameterBuffer,
    accumulator: GradientAccumulator,
    comm: Communicator,
    dtype: torch.dtype | None,
) -> GradientSharing | None:
    """The sharing of a rank's gradients; None if it keeps all sums, which is set here. Local.

    Args:
        dtype: that of gradients on the wire; None: their own.
    """
    if shards(plan, "gradients"):
        return GradientSharing(plan, rank, buffer, accumulator, comm, dtype or buffer.dtype)
    accumulator.keep(buffer.whole)
    return None


def _pieces(
    buffer: ParameterBuffer, parameters: Iterable[nn.Parameter], spans: Iterable[Span]
) -> Iterator[_Piece]:
    """Spans of the flat index space as pieces of parameters, in order."""
    placed = sorted(parameters, key=buffer.place)
    for span in spans:
        for parameter in placed:
            first, last = buffer.place(parameter)
            start, stop = max(span.start, first), min(span.stop, last)
            if start < stop:
                yield _Piece(parameter, start - first, stop - first)
