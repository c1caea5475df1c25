"""Products beside their communication: rows of tokens arrive or leave while others are computed.

The products of a linear layer are cut along tokens into as many strips for each rank of the group.
Those of other ranks' tokens leave while the next are computed, this rank's own come last; where
tokens arrive, this rank's own come first. (Wang et al. 2023 decompose collectives with their
products likewise; T3, Pati et al. 2024, does it in hardware.) Matrix products of other lengths may
have other bits, so the number of strips is a constant of a run, and one rank computes them all.
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

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size

    @property
    def index(self) -> int:
        return 0 if self.group is None else self.group.index

    def of(self, member: int, strip: int) -> slice:
        """The rows of a member's strip among those of all ranks."""
        length = self.rows // self.strips
        first = member * self.rows + strip * length
        return slice(first, first + length)

    def rounds(self) -> Iterator[tuple[int, int, int]]:
        """(member to which this rank sends, member from which it receives, strip), in order."""
        for distance in range(1, self.size):
            for strip in range(self.strips):
                to, source = self.index + distance, self.index - distance
                yield to % self.size, source % self.size, strip

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
        self._rounds: deque[tuple[slice, Handle]] = deque()
        """What has not been waited for."""
        if cut.group is None:
            return
        self._all = value.new_empty(cut.size * cut.rows, *value.shape[1:])
        self._all[cut.index * cut.rows : (cut.index + 1) * cut.rows].copy_(value)
        for to, source, strip in cut.rounds():
            own, rows = self._all[cut.of(cut.index, strip)], cut.of(source, strip)
            self._rounds.append((rows, cut.exchange(own, to, self._all[rows], source)))

    @property
    def count(self) -> int:
        return self._all.shape[0]

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        for strip in range(self._cut.strips):
            rows = self._cut.of(self._cut.index, strip)
            yield rows, self._all[rows]
        while self._rounds:
            rows, handle = self._rounds.popleft()
            handle.wait()
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
    partials: dict[tuple[int, int], Tensor] = {}
    for to, source, strip in cut.rounds():
        sent = product(cut.of(to, strip)).contiguous()
        partials[source, strip] = torch.empty_like(sent)
        handles.append(cut.exchange(sent, to, partials[source, strip], source))
    for strip in range(cut.strips):
        partials[cut.index, strip] = product(cut.of(cut.index, strip))

    def finish() -> Tensor:
        for handle in handles:
            handle.wait()
        sums = [
            add([partials[member, strip] for member in range(cut.size)])
            for strip in range(cut.strips)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    return finish
