"""The simulator: when every action of a set of programs runs, from the costs of actions and
messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.parallel.errors import ScheduleError
from holdfast.parallel.schedules.actions import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Action,
    ActionKey,
    Op,
    Program,
    peak_in_flight,
)
from holdfast.parallel.schedules.messages import matching_receive, owners, with_messages

_Message = tuple[Op, ActionKey, int | None, int | None]
"""The receive, what passes, sender and receiver."""
_NAMED_RANKS = 4
"""Blocked ranks that the message of a deadlock names; the others follow from them."""


class ActionSpan(NamedTuple):
    """A compute action and its start and end, in the unit of the costs."""

    action: Action
    start: float
    stop: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step. Times are in the unit of the costs, from 0."""

    makespan: float
    spans: Mapping[int, tuple[ActionSpan, ...]]
    """Compute actions by rank, in order."""
    busy: Mapping[int, float]
    """The time that each rank computes."""
    peak_in_flight: Mapping[int, int]
    """The most chunk activations that each rank keeps at once, each freed by its B or I."""
    peak_saved: Mapping[int, int]
    """The same, each freed by its B or W, as memory is."""

    @property
    def bubble(self) -> float:
        """The time of the step beyond its busiest rank's work, as a fraction of that work."""
        busiest = max(self.busy.values(), default=0.0)
        return self.makespan / busiest - 1 if busiest > 0 else 0.0

    def idle(self, rank: int) -> float:
        """The time that a rank waits between its first and its last compute action."""
        spans = self.spans[rank]
        return spans[-1].stop - spans[0].start - self.busy[rank] if spans else 0.0


def unit_cost(
    forward: float = 1.0,
    backward_input: float = 1.0,
    backward_weight: float = 1.0,
    *,
    virtual: int = 1,
) -> Callable[[Action], float]:
    """Costs that depend only on the kind of action; a whole backward costs both of its parts.

    Args:
        forward: the time of a rank's part of the model for one micro-batch, over all its chunks.
        backward_input, backward_weight: likewise, for the two parts of a backward.
        virtual: the number of chunks per rank, among which these times are divided.
    """
    costs = {
        Op.FORWARD: forward / virtual,
        Op.BACKWARD: (backward_input + backward_weight) / virtual,
        Op.BACKWARD_INPUT: backward_input / virtual,
        Op.BACKWARD_WEIGHT: backward_weight / virtual,
    }
    return lambda action: costs[action.op]


def simulate(
    programs: Mapping[int, Program],
    cost: Callable[[Action], float],
    message_cost: float | Callable[[Action], float] = 0.0,
) -> Timeline:
    """Run the programs in order on every rank: sends never wait, receives wait for their message.

    Args:
        programs: by rank, all with messages or all without: then `with_messages` adds them.
        cost: the time of a compute action.
        message_cost: the time from a send to the message's arrival, or a function of the send.
            Messages do not share a link's bandwidth.
    Returns:
        The timeline.
    Raises:
        ScheduleError: the programs deadlock; the message names the blocked ranks, positions and
            actions.
    """
    if all(action.op in COMPUTE for program in programs.values() for action in program):
        owner = owners(programs)
        programs = with_messages(programs, lambda chunk, micro_batch: owner[chunk, micro_batch])
    run = _Simulation(programs, cost, message_cost)
    run.finish()
    return Timeline(
        makespan=max(run.clocks.values(), default=0.0),
        spans={rank: tuple(spans) for rank, spans in run.spans.items()},
        busy=run.busy,
        peak_in_flight={r: int(peak_in_flight(p, until="input")) for r, p in programs.items()},
        peak_saved={r: int(peak_in_flight(p, until="weight")) for r, p in programs.items()},
    )


class _Simulation:
    """One simulation. Times follow from data dependencies; each rank runs as far as it can."""

    def __init__(
        self,
        programs: Mapping[int, Program],
        cost: Callable[[Action], float],
        message_cost: float | Callable[[Action], float],
    ) -> None:
        self.clocks = dict.fromkeys(programs, 0.0)
        self.busy = dict.fromkeys(programs, 0.0)
        self.spans: dict[int, list[ActionSpan]] = {rank: [] for rank in programs}
        self._programs = programs
        self._cost = cost
        self._message_cost = message_cost
        self._positions = dict.fromkeys(programs, 0)
        self._arrivals: dict[_Message, float] = {}
        self._waiting: set[_Message] = set()
        self._runnable = list(programs)

    def finish(self) -> None:
        while self._runnable:
            self._advance(self._runnable.pop())
        blocked = [r for r, p in self._programs.items() if self._positions[r] < len(p)]
        if blocked:
            raise ScheduleError(self._deadlock(blocked))

    def _advance(self, rank: int) -> None:
        """Run a rank up to a receive whose message is not sent yet."""
        program, position, clock = self._programs[rank], self._positions[rank], self.clocks[rank]
        spans, arrivals, waiting = self.spans[rank], self._arrivals, self._waiting
        busy = self.busy[rank]
        while position < len(program):
            action = program[position]
            op = action.op
            if op in RECEIVES:
                key = (op, action.key, action.peer, rank)
                arrival = arrivals.get(key)
                if arrival is None:
                    waiting.add(key)
                    break
                clock = max(clock, arrival)
            elif op in SENDS:
                received = matching_receive(action, rank)
                key = (received.op, received.key, rank, action.peer)
                arrivals[key] = clock + self._latency(action)
                if key in waiting:
                    assert action.peer is not None
                    self._runnable.append(action.peer)
            else:
                duration = self._cost(action)
                spans.append(ActionSpan(action, clock, clock + duration))
                clock += duration
                busy += duration
            position += 1
        self._positions[rank], self.clocks[rank], self.busy[rank] = position, clock, busy

    def _latency(self, send: Action) -> float:
        cost = self._message_cost
        return cost if isinstance(cost, int | float) else cost(send)

    def _deadlock(self, blocked: list[int]) -> str:
        lines = []
        for rank in blocked[:_NAMED_RANKS]:
            position = self._positions[rank]
            action = self._programs[rank][position]
            lines.append(
                f"rank {rank} waits at position {position} in {action}, {self._why(rank, action)}"
            )
        if len(blocked) > _NAMED_RANKS:
            lines.append(f"and {len(blocked) - _NAMED_RANKS} more ranks")
        return "the programs deadlock: " + "; ".join(lines)

    def _why(self, rank: int, receive: Action) -> str:
        peer = receive.peer
        assert peer is not None
        for position, action in enumerate(self._programs.get(peer, ())):
            sent = action.op in SENDS and action.peer == rank
            if sent and matching_receive(action, peer) == receive:
                return f"which rank {peer} sends only at position {position}"
        return f"which rank {peer} never sends"
