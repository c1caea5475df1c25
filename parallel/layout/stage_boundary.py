"""The boundary between two stage replicas: which tokens of a hidden state each rank sends to which.

Replicas of one size send shard to shard. Where they differ, because one has lost ranks, a message
has the tokens that its sender has and its receiver needs. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby

from holdfast.parallel.layout.mesh import Mesh

Routes = tuple[Mapping[int, tuple[int, ...]], ...]
"""By receiving shard: sending shard -> the units of tokens that it sends; see
`Mesh.token_units`."""


@lru_cache(maxsize=256)
def boundary_routes(sender: Mesh, receiver: Mesh) -> Routes:
    """The messages from a stage replica to another one, each unit once to each that needs it. Pure.

    Where several ranks have the same tokens, receivers are divided among them.
    """
    having: dict[int, list[int]] = {}
    for shard, units in enumerate(sender.token_units):
        for unit in units:
            having.setdefault(unit, []).append(shard)
    found = []
    for shard, units in enumerate(receiver.token_units):
        index = receiver.along(shard)["tensor"]
        routes: dict[int, list[int]] = {}
        for unit in units:
            copies = having[unit]
            source = copies[index * len(copies) // receiver.tensor]
            routes.setdefault(source, []).append(unit)
        found.append({source: tuple(of_source) for source, of_source in sorted(routes.items())})
    return tuple(found)


def unit_rows(held: Sequence[int], units: Sequence[int], rows: int) -> tuple[slice, ...]:
    """The rows of some units in the hidden state of a rank, as few ranges as hold them. Pure.

    Args:
        held: the rank's units, in the order of its rows.
        units: some of these, in any order that sender and receiver share.
        rows: the rows of a unit.
    """
    places = sorted(held.index(unit) for unit in units)
    runs = groupby(enumerate(places), key=lambda numbered: numbered[1] - numbered[0])
    ranges = [[place for _, place in run] for _, run in runs]
    return tuple(slice(run[0] * rows, (run[-1] + 1) * rows) for run in ranges)
