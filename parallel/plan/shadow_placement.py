"""Shadow placement: which ranks keep copies of which blocks.

Copies lie outside the owner's node and, if possible, outside all its groups. Such a copy survives
the loss of a whole group (a node, a switch, a stage replica), as in ByteRobust (2025). Pure; needs
no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice

from holdfast.parallel.layout import StageReplicas

_CONSIDERED = 128
"""Ranks considered for one owner: all of a small run, enough of a large one."""
_ENOUGH = 16
"""Ranks without a flaw after which no more are considered."""

Shadows = tuple[tuple[int, ...], ...]
"""The shadows of each block, by position among the blocks of its part."""


def assign_shadows(
    sizes: Sequence[int],
    owners: Sequence[int],
    stage_replicas: StageReplicas,
    node_of: Mapping[int, str],
    redundancy: int,
    *,
    load: dict[int, int],
    previous: Sequence[tuple[int, ...]] | None = None,
    with_state: Set[int] = frozenset(),
) -> Shadows:
    """The shadows of every block of one part of the parameters.

    Earlier shadows stay while they still serve; the others go to the least loaded of the best
    ranks. On a single node, shadows lie on another rank of it; a rank that is alone has none.

    Args:
        owners: the owner of each block.
        node_of: the failure domain of each rank.
        redundancy: the number of shadows per block.
        load: the number of elements that each rank shadows already; updated in place.
        previous: the earlier shadows of each block; only those in `with_state` still have a copy.
    """
    found: list[tuple[int, ...]] = []
    candidates: dict[int, _Candidates] = {}
    for block, (size, owner) in enumerate(zip(sizes, owners, strict=True)):
        before = previous[block] if previous is not None else ()
        kept = [r for r in before if r in with_state and node_of[r] != node_of[owner]][:redundancy]
        if len(kept) < redundancy:
            if owner not in candidates:
                ranked = _places(owner, stage_replicas, node_of)
                candidates[owner] = _Candidates(ranked, redundancy, load, node_of)
            good = candidates[owner].acceptable
            kept = [r for r in before if r in with_state and r in good][:redundancy]
        for rank in kept:
            load[rank] = load.get(rank, 0) + size
        while len(kept) < redundancy:
            rank = candidates[owner].best(kept)
            if rank is None:
                break
            kept.append(rank)
            load[rank] = load.get(rank, 0) + size
        found.append(tuple(kept))
    return tuple(found)


class _Candidates:
    """The ranks that may shadow one owner's blocks, the best first while loads grow."""

    def __init__(
        self,
        ranked: Sequence[tuple[int, int]],
        redundancy: int,
        loads: Mapping[int, int],
        node_of: Mapping[int, str],
    ) -> None:
        """Loads are read, and may grow between calls.

        Args:
            ranked: (penalty, rank), as of `_places`.
        """
        self._loads, self._node_of = loads, node_of
        elsewhere = {rank for penalty, rank in ranked if penalty < _SAME_NODE}
        enough = len(elsewhere) >= redundancy
        self.acceptable = elsewhere if enough else {rank for _, rank in ranked}
        """The ranks on other nodes; all ranks if these are too few."""
        self._heap = [
            (penalty, loads.get(rank, 0), order, rank)
            for order, (penalty, rank) in enumerate(ranked)
        ]
        heapify(self._heap)
        self._nodes: dict[int, set[str]] = {}
        """By penalty, the nodes of its ranks."""
        for penalty, rank in ranked:
            self._nodes.setdefault(penalty, set()).add(node_of[rank])

    def best(self, kept: Sequence[int]) -> int | None:
        """The rank with the least penalty, best on another node than those that are kept, and with
        the least load; None: all are kept.
        """
        nodes = {self._node_of[rank] for rank in kept}
        passed: list[tuple[int, int, int, int]] = []
        found: tuple[int, int, int, int] | None = None
        while self._heap and (found is None or self._heap[0][0] == found[0]):
            place = penalty, load, order, rank = self._heap[0]
            now = self._loads.get(rank, 0)
            if load != now:
                heapreplace(self._heap, (penalty, now, order, rank))
                continue
            if rank not in kept:
                if self._node_of[rank] not in nodes or self._nodes[penalty] <= nodes:
                    found = place
                    break
                found = found or place
            passed.append(heappop(self._heap))
        for place in passed:
            heappush(self._heap, place)
        return None if found is None else found[-1]


_SAME_NODE = 8


def _places(
    owner: int, stage_replicas: StageReplicas, node_of: Mapping[int, str]
) -> list[tuple[int, int]]:
    """(penalty, rank): other nodes first, then outside its owner's stage replica and stage."""
    ranks = stage_replicas.ranks
    at = stage_replicas.find(owner)
    begin = bisect_left(ranks, owner) + max(1, len(ranks) // 2)
    turned = (ranks[(begin + k) % len(ranks)] for k in range(len(ranks)))
    found: list[tuple[int, int]] = []
    flawless = 0
    for rank in islice((r for r in turned if r != owner), _CONSIDERED):
        penalty = _SAME_NODE if node_of[rank] == node_of[owner] else 0
        other = stage_replicas.find(rank)
        if at is not None and other is not None:
            same_stage_replica = (other.data, other.pipeline) == (at.data, at.pipeline)
            penalty += 4 * same_stage_replica + 2 * (other.pipeline == at.pipeline)
            penalty += other.data == at.data
        found.append((penalty, rank))
        flawless += penalty == 0
        if flawless == _ENOUGH:
            break
    return found
