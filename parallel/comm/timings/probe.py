"""Messages that try links: one at a time per rank, with nothing else on the way.

In a step, messages share links and processors with others and with computation. What seems slow
there is tried again alone, over several strides: with stride k each rank sends to the k-th after
it. So each rank has several edges, and a slow link is told apart from a slow end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from holdfast.parallel.comm.protocol import Communicator
from holdfast.parallel.comm.tags import PROBES
from holdfast.parallel.comm.timings.matrix import LEAST_MESSAGES, Edge

_MOST_STRIDES = 6
_MESSAGES = LEAST_MESSAGES + 2
"""Over each stride; the first makes the connection."""


def strides(ranks: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The strides over which links between so many ranks are tried. Pure.

    Args:
        edges: the positions of sources and destinations that are tried in any case.
    """
    asked = [(destination - source) % ranks for source, destination in edges]
    usual = [stride for stride in (1, 2, ranks // 2 + 1) if 0 < stride < ranks]
    return list(dict.fromkeys([*asked, *usual]))[:_MOST_STRIDES]


def roles(index: int, ranks: int, stride: int, turn: int) -> tuple[bool, bool]:
    """Whether a rank sends, and whether it receives, in one of the three turns of a stride. Pure.

    A rank with a slow sending side would be late with what it has to say to those it receives from,
    if it did both at once. So the ranks of each cycle take turns.
    """

    def sends(at: int) -> bool:
        first = at % math.gcd(ranks, stride)
        length, place = ranks // math.gcd(ranks, stride), 0
        while (first + place * stride) % ranks != at:
            place += 1
        return turn == (2 if length % 2 and place == length - 1 else place % 2)

    return sends(index), sends((index - stride) % ranks)


def probe(world: Communicator, edges: Iterable[Edge], size: int, device: torch.device) -> None:
    """Send messages over several strides; the flight recorder has their times. Collective.

    Args:
        edges: pairs of ranks that are tried in any case; the same on all ranks.
        size: of each message, in bytes.
    """
    count, index, ranks = world.size, world.index, world.ranks
    positions = [(ranks.index(source), ranks.index(target)) for source, target in edges]
    own = torch.zeros(size, dtype=torch.uint8, device=device)
    taken = torch.empty_like(own)
    number = 0
    for stride in strides(count, positions):
        source, target = ranks[(index - stride) % count], ranks[(index + stride) % count]
        for turn in range(3):
            sends, receives = roles(index, count, stride, turn)
            for _ in range(_MESSAGES):
                tag = PROBES.wrapped(number)
                if receives:
                    world.receive(taken, source, tag).wait()
                if sends:
                    world.send(own, target, tag).wait()
                if device.type == "cuda":  # whose handles do not block the host
                    torch.cuda.synchronize(device)
                number += 1
    world.history()  # has a device's transport note what has ended
