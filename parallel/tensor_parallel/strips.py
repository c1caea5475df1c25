"""Products beside their communication: rows of tokens arrive or leave while others are computed.

The products of a linear layer are cut along tokens into as many strips for each rank of the group.
Those of other ranks' tokens leave while the next are computed, this rank's own come last; where
tokens arrive, this rank's own come first. (Wang et al. 2023 decompose collectives with their
products likewise; T3, Pati et al. 2024, does it in hardware.) Matrix products of other lengths may
have other bits, so the number of strips is a constant of a run, and one rank computes them all. How
many of them travel in one message is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator, Handle

Add = Callable[[Sequence[Tensor]], Tensor]
"""Sums the ranks' partial products, given in the order of the ranks."""
Product = Callable[[slice], Tensor]
"""Computes this rank's partial product for some rows of tokens."""


class Rows(Protocol):
    """The rows of all tokens, of which some may be on their way."""

    @property
    def count(self) -> int: ...

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their values, each as soon as it is here."""
        ...

    def whole(self) -> Tensor:
        """All rows, once they are here."""
        ...


class WholeRows:
    """Rows that are computed with as one, after a message if there is one."""

    def __init__(self, value: Tensor, message: Handle | None = None) -> None:
        self._value, self._message = value, message

    @property
    def count(self) -> int:
        return self._value.shape[0]

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self._value.shape[0]), self.whole()

    def whole(self) -> Tensor:
        if self._message is not None:
            self._message.wait()
            self._message = None
        return self._value


@dataclass(frozen=True, slots=True)
class Cut:
    """The cut of each rank's tokens into strips of equal length."""

    group: Communicator | None
    """None: one rank has all tokens."""
    rows: int
    """The rows of one rank's tokens."""
    strips: int
    """Of one rank's tokens."""
    per_message: int = 1
    """The strips that travel together, at most."""

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size

    @property
    def index(self) -> int:
        return 0 if self.group is None else self.group.index

    def of(self, member: int, strips: range) -> slice:
        """The rows of some of a member's strips, one after another, among those of all ranks."""
        length = self.rows // self.strips
        first = member * self.rows
        return slice(first + strips.start * length, first + strips.stop * length)

    def each(self, member: int, strips: range) -> list[slice]:
        """The rows of each of some of a member's strips."""
        return [self.of(member, range(strip, strip + 1)) for strip in strips]

    @property
    def messages(self) -> list[range]:
        """The strips that travel together."""
        starts = range(0, self.strips, self.per_message)
        return [range(first, min(first + self.per_message, self.strips)) for first in starts]

    def rounds(self) -> Iterator[tuple[int, int, range]]:
        """(member to which this rank sends, member from which it receives, strips), in order."""
        for distance in range(1, self.size):
            for strips in self.messages:
                to, source = self.index + distance, self.index - distance
                yield to % self.size, source % self.size, strips

    def exchange(self, sent: Tensor, to: int, received: Tensor, source: int) -> Handle:
        """Begin one round."""
        assert self.group is not None
        none = sent.new_empty(0)
        members = range(self.size)
        return self.group.all_to_all(
            [received if member == source else none for member in members],
            [sent if member == to else none for member in members],
        )


class ArrivingRows:
    """The rows of all ranks' tokens: this rank's own are here, strips of the others arrive."""

    def __init__(self, cut: Cut, value: Tensor) -> None:
        """Begin. Collective.

        Args:
            value: this rank's rows.
        """
        self._cut, self._all = cut, value
        self._rounds: deque[tuple[Sequence[slice], Handle]] = deque()
        """The strips that have not been waited for."""
        if cut.group is None:
            return
        self._all = value.new_empty(cut.size * cut.rows, *value.shape[1:])
        self._all[cut.index * cut.rows : (cut.index + 1) * cut.rows].copy_(value)
        for to, source, strips in cut.rounds():
            own, arriving = (self._all[cut.of(member, strips)] for member in (cut.index, source))
            handle = cut.exchange(own, to, arriving, source)
            self._rounds.append((cut.each(source, strips), handle))

    @property
    def count(self) -> int:
        return self._all.shape[0]

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        cut = self._cut
        for rows in cut.each(cut.index, range(cut.strips)):
            yield rows, self._all[rows]
        while self._rounds:
            strips, handle = self._rounds.popleft()
            handle.wait()
            for rows in strips:
                yield rows, self._all[rows]

    def whole(self) -> Tensor:
        while self._rounds:
            self._rounds.popleft()[1].wait()
        return self._all


def leaving_sums(cut: Cut, product: Product, add: Add) -> Callable[[], Tensor]:
    """Compute this rank's partial products, and send them on their way. Collective.

    Returns:
        Gives the sums of this rank's tokens, once all have arrived.
    """
    handles: list[Handle] = []
    partials: dict[tuple[int, range], Tensor] = {}

    def products(member: int, strips: range) -> Tensor:
        return _joined([product(rows) for rows in cut.each(member, strips)])

    for to, source, strips in cut.rounds():
        sent = products(to, strips).contiguous()
        partials[source, strips] = torch.empty_like(sent)
        handles.append(cut.exchange(sent, to, partials[source, strips], source))
    for strips in cut.messages:
        partials[cut.index, strips] = products(cut.index, strips)

    def finish() -> Tensor:
        for handle in handles:
            handle.wait()
        return _joined(
            [
                add([partials[member, strips] for member in range(cut.size)])
                for strips in cut.messages
            ]
        )

    return finish


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
