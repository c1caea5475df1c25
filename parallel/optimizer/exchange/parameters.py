"""The gathering of updated parameters from their owners, awaited at each parameter's first use.

Owners send each bucket as soon as it is updated, in the order of first use, and the next forward
pass begins while later layers arrive. Exact-mode safe: the values are copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from holdfast.parallel.comm import GATHERING, Communicator, Handle
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.optimizer.exchange.arrival import Arrival
from holdfast.parallel.optimizer.exchange.buckets import Bucket, Gathering
from holdfast.parallel.optimizer.exchange.wire import in_one
from holdfast.parallel.optimizer.parameter_buffer import OwnedParameters, ParameterBuffer


class ParameterArrival:
    """The parameters of one rank that are on their way from their owners.

    It belongs to the rank's modules, which wait here before they use a parameter. Local.
    """

    def __init__(self) -> None:
        """Nothing is on its way."""
        self._pending: dict[nn.Parameter, list[Arrival]] = {}
        self._arrivals: list[Arrival] = []
        self._sends: Sequence[Handle] = ()
        self._lost: PeerLost | None = None
        """Why the messages of the last update are not all under way."""

    @property
    def is_pending(self) -> bool:
        """Whether some parameter may not be here yet."""
        return bool(self._pending) or self._lost is not None

    def begin(self, arrivals: Sequence[tuple[Bucket, Arrival]], sends: Sequence[Handle]) -> None:
        """Replace what is under way by the messages of a new update."""
        self._lost = None
        self._arrivals, self._sends = [arrival for _, arrival in arrivals], sends
        self._pending = {}
        for bucket, arrival in arrivals:
            for parameter in bucket.parameters:
                self._pending.setdefault(parameter, []).append(arrival)

    def lose(self, error: PeerLost) -> None:
        """Replace what is under way by the reason why a new update could not begin to gather.

        Waits raise it, and the update does not: an update that is begun is brought to its end,
        because no rank can tell how much of it to repeat.
        """
        self.cancel()
        self._lost = error

    def use(self, parameters: Iterable[nn.Parameter]) -> None:
        """Wait for parameters that are about to be used.

        Raises:
            PeerLost: an owner is gone.
        """
        if self._lost is not None:
            raise self._lost
        if self._pending:
            for parameter in parameters:
                for arrival in self._pending.get(parameter, ()):
                    arrival.finish()
                self._pending.pop(parameter, None)

    def finish(self) -> None:
        """Wait for all messages, those that leave this rank included.

        Raises:
            PeerLost: a peer is gone.
        """
        if self._lost is not None:
            raise self._lost
        for arrival in self._arrivals:
            arrival.finish()
        for send in self._sends:
            send.wait()
        self.cancel()

    def cancel(self) -> None:
        """Wait for nothing any longer: all parameters are here without what is under way. Local."""
        self.begin((), ())

    def watch(self, module: nn.Module) -> None:
        """Wait before each forward pass of a part of `module` for the parameters it uses itself."""
        for part in module.modules():
            own = () if _is_container(part) else tuple(_used_by(part))
            if own:
                part.register_forward_pre_hook(lambda *_, own=own: self.use(own))


def _is_container(module: nn.Module) -> bool:
    """Whether a module has no forward pass: its parameters are used by the module around it."""
    return type(module).forward is nn.Module.forward


def _used_by(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module itself, and of containers in it."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if _is_container(child):
            yield from _used_by(child)


def send_bucket(
    comm: Communicator, parameters: OwnedParameters, found: Gathering, row: int
) -> list[Handle]:
    """Begin to send an owned bucket's parameters to their other keepers."""
    # Most peers lack the same blocks: blocks in several places are copied once for all of these.
    parts = {
        spans: in_one(parameters.parts(spans)) for spans in {spans for _, spans in found.sends[row]}
    }
    return [comm.send(parts[spans], peer, GATHERING.tag(row)) for peer, spans in found.sends[row]]


def receive_buckets(
    comm: Communicator, buffer: ParameterBuffer, found: Gathering
) -> list[tuple[Bucket, Arrival]]:
    """Begin to receive the parameters of other owners' buckets."""
    return [
        (
            bucket,
            Arrival(
                comm,
                bucket.owner,
                GATHERING.tag(bucket.row),
                [buffer.parts(use) for use in uses],
            ),
        )
        for bucket, uses in found.receives
    ]
