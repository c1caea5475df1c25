"""A message on its way to one or more places of a rank's flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from holdfast.parallel.comm import Communicator, Handle


class Arrival:
    """One message that is received, and then written to each of its uses. Local."""

    def __init__(
        self, comm: Communicator, peer: int, tag: int, uses: Sequence[Sequence[Tensor]]
    ) -> None:
        """Begin to receive.

        Args:
            uses: for each use, its flat places in the order of the message; at least one.
        """
        first, *others = uses
        # A use in one place is received there; the others are copied from it.
        self._uses = others if len(first) == 1 else uses
        self._message = first[0]
        if len(first) > 1:
            self._message = first[0].new_empty(sum(place.numel() for place in first))
        self._handle: Handle | None = comm.receive(self._message, peer, tag)

    def finish(self) -> None:
        """Wait until every place has its values; at once if they have them already.

        Raises:
            PeerLost: the peer is gone.
        """
        if self._handle is None:
            return
        self._handle.wait()
        self._handle = None
        for places in self._uses:
            spread(self._message, places)


def spread(message: Tensor, places: Sequence[Tensor]) -> None:
    """Write a flat message to flat places, one after another."""
    for place, part in zip(places, message.split([p.numel() for p in places]), strict=True):
        place.copy_(part)
