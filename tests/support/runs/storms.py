"""Storms of faults as data: what hits a run, where, when and for how long, from one number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "kill a worker",
    "stop a worker",
    "stop an agent",
    "stop an agent for good",
    "kill an agent",
    "stall the disk",
    "slow syncs",
    "fill the disk",
    "cut a node",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
OF_A_NODE: tuple[Kind, ...] = (
    "stop an agent",
    "stop an agent for good",
    "kill an agent",
    "cut a node",
)
"""Faults that may cost all ranks of a node."""
OF_THE_DISK: tuple[Kind, ...] = ("stall the disk", "slow syncs", "fill the disk")
"""Faults that cost no rank. Each at most once in a trial, since two of a kind cannot overlap."""
DEADLY: tuple[Kind, ...] = ("stop an agent for good", "kill an agent")
"""Faults after which a node is gone. At most one of a trial, so that the others can go on."""
CUTS_S = (20.0, 40.0, 60.0)
STALL_S = 5.0
LAYOUTS = ((4, 1, 1), (2, 2, 1), (2, 1, 2), (3, 1, 1), (3, 2, 1), (2, 2, 2))
"""(data, pipeline, tensor)."""
SHARDS = ("optimizer", "parameters", "gradients")
MOST_FAULTS = 3


@dataclass(frozen=True, slots=True)
class Blow:
    """One fault of a storm."""

    kind: Kind
    after_s: float
    """Seconds from the fault before, or from the run's first steps."""
    seconds: float
    """How long it lasts; 0 where nothing takes it back."""
    node: int
    pick: float
    """Which rank of the node is hit, in [0, 1)."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a storm."""

    number: int
    layout: tuple[int, int, int]
    nodes: int
    blows: tuple[Blow, ...]

    @property
    def ranks(self) -> int:
        """Data times pipeline times tensor."""
        data, pipeline, tensor = self.layout
        return data * pipeline * tensor

    @property
    def shard(self) -> str:
        """What the replicas share."""
        return SHARDS[self.number // 2 % len(SHARDS)]

    @property
    def has_network(self) -> bool:
        """Whether each node is a task in a network namespace; else one command starts all nodes."""
        return any(blow.kind == "cut a node" for blow in self.blows)


def trial_of(number: int) -> Trial:
    """The trial of this number. Its first fault is the next kind in turn. Pure."""
    chance = random.Random(number)
    first = KINDS[number % len(KINDS)]
    more = [chance.choice(KINDS) for _ in range(chance.randrange(MOST_FAULTS))]
    if first == "cut a node":
        more = [kind for kind in more if kind not in DEADLY]
    else:
        more = [kind for kind in more if kind != "cut a node"]
    kinds: list[Kind] = [first]
    for kind in more:
        is_second = kind in DEADLY and any(other in DEADLY for other in kinds)
        if not is_second and not (kind in OF_THE_DISK and kind in kinds):
            kinds.append(kind)
    nodes = chance.choice((2, 3))
    return Trial(
        number,
        chance.choice([layout for layout in LAYOUTS if _size(layout) >= nodes]),
        nodes,
        tuple(_blow(kind, number, nodes, chance) for kind in kinds),
    )


def _size(layout: tuple[int, int, int]) -> int:
    data, pipeline, tensor = layout
    return data * pipeline * tensor


def _blow(kind: Kind, number: int, nodes: int, chance: random.Random) -> Blow:
    lasting: dict[Kind, float] = {
        "stop an agent": chance.uniform(1.0, 8.0),
        "stall the disk": STALL_S,
        "slow syncs": chance.uniform(5.0, 15.0),
        "fill the disk": chance.uniform(3.0, 12.0),
        "cut a node": CUTS_S[number // len(KINDS) % len(CUTS_S)],
    }
    # The side of the Lighthouse is the one that goes on: the node that hosts it is not cut off.
    node = chance.randrange(kind == "cut a node", nodes)
    return Blow(kind, chance.uniform(0.0, 4.0), lasting.get(kind, 0.0), node, chance.random())


@dataclass(frozen=True, slots=True)
class Moment:
    """When a fault begins, or is taken back."""

    at_s: float
    blow: Blow
    begins: bool


def timeline(trial: Trial) -> list[Moment]:
    """When what happens, in order, in seconds from the run's first steps. Faults may overlap.
    Pure.
    """
    moments, at_s = [], 0.0
    for blow in trial.blows:
        at_s += blow.after_s
        moments.append(Moment(at_s, blow, begins=True))
        if blow.seconds:
            moments.append(Moment(at_s + blow.seconds, blow, begins=False))
    return sorted(moments, key=lambda moment: moment.at_s)
