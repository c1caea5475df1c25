"""The program of a rank: the actions of a step, in order.

A regular plan takes the schedule's order for each replica's own pipeline. If stages differ in their
number of replicas, activations cross pipelines, and rerouting.py gives the order. Pure; needs no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from holdfast.parallel.layout import Coordinates, boundary_routes
from holdfast.parallel.plan.initial import entering_order
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.rerouting import (
    SCHEDULED_PAIRS,
    merged_program,
    regular_timeline,
    scheduled_programs,
    stage_caps,
)
from holdfast.parallel.plan.speeds import usual_ranks, widest_capacities
from holdfast.parallel.plan.team_programs import Waves, team_program, waves_of
from holdfast.parallel.schedules import (
    SENDS,
    Op,
    PeersOf,
    Program,
    compute_programs,
    forward_only,
    in_stretches,
    peak_in_flight,
    program_with_messages,
)

_Generator = Callable[[str, int, int, int, int], tuple[Program, ...]]
"""(schedule, pipeline, virtual, micro-batches, stretches) -> compute actions by pipeline index."""


def training_program(plan: Plan, rank: int, only: frozenset[int] | None = None) -> Program:
    """The program of a rank in a training step, with global micro-batch numbers and peers' ranks.

    Args:
        only: the micro-batches to compute; None: all.
    """
    return _with_messages(plan, rank, compute_program(plan, rank, only))


def compute_program(plan: Plan, rank: int, only: frozenset[int] | None = None) -> Program:
    """The program of a rank in a training step, without its messages. Arguments as above."""
    return _compute_program(plan, "train", rank, compute_programs, only)


def own_program(plan: Plan, rank: int) -> Program:
    """The program of a rank in a training step, without its messages, for what does not ask which
    micro-batches these are: a replica's own may be numbered from 0.
    """
    at = plan.stage_replicas.find(rank)
    if at is None or not plan.is_regular or plan.spreads_experts:
        return compute_program(plan, rank)
    return _regular_program(plan, "train", compute_programs, at, len(plan.micro_batches[at.data]))


def team_micro_batches(plan: Plan, rank: int, only: frozenset[int] | None = None) -> int | None:
    """The micro-batches of a step that a rank's experts work for; None: the rank's own. Pure.

    Args:
        only: as of `training_program`.
    """
    at = plan.stage_replicas.find(rank)
    if at is None or not plan.spreads_experts:
        return None
    return sum(
        only is None or number in only
        for replica in plan.team_of(at.pipeline, at.data)
        for number in plan.micro_batches_of(at.pipeline, replica)
    )


def evaluation_program(plan: Plan, rank: int) -> Program:
    """The program of a rank that evaluates one global batch: forwards only."""
    return _with_messages(plan, rank, _compute_program(plan, "forward", rank, forward_only))


def _compute_program(
    plan: Plan,
    kind: str,
    rank: int,
    generate: _Generator,
    only: frozenset[int] | None = None,
) -> Program:
    at = plan.stage_replicas.find(rank)
    if at is None:
        return ()
    if plan.spreads_experts:
        return _in_team(plan, kind, at, only, generate)
    if plan.is_regular:
        numbers = plan.micro_batches[at.data]
        if only is not None:
            numbers = tuple(number for number in numbers if number in only)
        local = _regular_program(plan, kind, generate, at, len(numbers))
        return tuple(replace(a, micro_batch=numbers[a.micro_batch]) for a in local)
    return _rerouted(plan, kind, at, only, generate)


def _with_messages(plan: Plan, rank: int, program: Program) -> Program:
    at = plan.stage_replicas.find(rank)
    if at is None:
        return ()
    return program_with_messages(program, _peers_of(plan, rank, at), chunks=len(plan.placement))


def _peers_of(plan: Plan, rank: int, at: Coordinates) -> PeersOf:
    """The ranks that a rank exchanges hidden states and their gradients with."""
    replicas, places, sends = _computing_replicas(plan), plan.stage_replicas, set(SENDS)
    here = len(places.stages[at.pipeline][at.data])

    def peers_of(op: Op, chunk: int, micro_batch: int) -> Sequence[int]:
        stage = plan.placement[chunk]
        there = places.stages[stage][replicas[stage][micro_batch]]
        if len(there) == here:  # shard to shard
            peer = there[at.shard]
            return () if peer == rank else (peer,)
        return [peer for peer in there if message_units(plan, rank, peer, sends=op in sends)]

    return peers_of


def message_units(plan: Plan, rank: int, peer: int, *, sends: bool) -> tuple[int, ...]:
    """The tokens of a message between two ranks of different stage replicas. Pure.

    Args:
        sends: whether `rank` sends it; else it receives it.
    Returns:
        Their units (`Mesh.token_units`); none if there is no such message.
    """
    sender, receiver = (rank, peer) if sends else (peer, rank)
    routes = boundary_routes(plan.mesh_of(sender), plan.mesh_of(receiver))
    shard_of = plan.stage_replicas.shard_index
    return routes[shard_of(receiver)].get(shard_of(sender), ())


def _regular_program(
    plan: Plan, kind: str, generate: _Generator, at: Coordinates, micro_batches: int
) -> Program:
    """The program at a place of a regular plan, with its replica's micro-batches from 0 on."""
    if not micro_batches:
        return ()
    return _schedule(plan, kind, generate, micro_batches)[at.pipeline]


def _schedule(
    plan: Plan, kind: str, generate: _Generator, micro_batches: int
) -> tuple[Program, ...]:
    """By stage, the actions of a replica that computes so many micro-batches itself."""
    return plan.derived(
        "regular programs",
        (kind, micro_batches),
        lambda: generate(
            plan.schedule,
            plan.stage_replicas.pipeline,
            plan.virtual,
            micro_batches,
            plan.stretches,
        ),
    )


def _computing_replicas(plan: Plan) -> tuple[dict[int, int], ...]:
    """By stage, the replica that computes each micro-batch."""
    return plan.derived(
        "computing replicas",
        None,
        lambda: tuple(
            {
                number: replica
                for replica in range(plan.stage_replicas.replicas(stage))
                for number in plan.micro_batches_of(stage, replica)
            }
            for stage in range(plan.stage_replicas.pipeline)
        ),
    )


def _rerouted(
    plan: Plan,
    kind: str,
    at: Coordinates,
    only: frozenset[int] | None,
    generate: _Generator,
) -> Program:
    """The compute actions of a stage replica when activations cross pipelines."""
    by_replica = _rows(plan, only)
    pairs = len(plan.placement) * sum(map(len, by_replica))
    if kind == "train" and 0 < pairs <= SCHEDULED_PAIRS:
        programs = plan.derived("scheduled programs", only, lambda: _scheduled(plan, by_replica))
        program = programs.get(at.pipeline * plan.stage_replicas.widest + at.data, ())
        return in_stretches(program, plan.stretches)
    places = plan.derived(
        "row places",
        None,
        lambda: {m: place for row in plan.micro_batches for place, m in enumerate(row)},
    )
    timeline = plan.derived(
        "regular timeline",
        kind,
        lambda: regular_timeline(
            _schedule(plan, kind, generate, max(map(len, plan.micro_batches)))
        ),
    )
    mine = plan.micro_batches_of(at.pipeline, at.data)
    wanted = mine if only is None else tuple(m for m in mine if m in only)
    return merged_program(wanted, places, timeline, at.pipeline)


def _rows(plan: Plan, only: frozenset[int] | None) -> tuple[tuple[int, ...], ...]:
    """The micro-batches of each data replica, of those wanted."""
    if only is None:
        return plan.micro_batches
    return tuple(tuple(m for m in row if m in only) for row in plan.micro_batches)


def _in_team(
    plan: Plan,
    kind: str,
    at: Coordinates,
    only: frozenset[int] | None,
    generate: _Generator,
) -> Program:
    """The compute actions of a stage replica whose team computes at the same time."""
    pipeline = plan.stage_replicas.pipeline

    def find() -> Waves:
        rows = _rows(plan, only)
        sizes = [plan.stage_replicas.sizes(stage) for stage in range(pipeline)]
        order = entering_order(rows, widest_capacities(plan))
        return waves_of(order, _computing_replicas(plan), sizes)

    waves: Waves = plan.derived("waves of teams", only, find)
    count = max(len(waves), *map(len, plan.micro_batches))
    programs = _schedule(plan, kind, generate, count)
    return team_program(plan, at, waves, programs, _computing_replicas(plan)[at.pipeline])


def _scheduled(plan: Plan, by_replica: tuple[tuple[int, ...], ...]) -> dict[int, Program]:
    """The list-scheduled compute actions of all stage replicas, by stage x widest + replica."""
    replicas, widest = _computing_replicas(plan), plan.stage_replicas.widest

    def number_of(stage: int, micro_batch: int) -> int:
        return stage * widest + replicas[stage][micro_batch]

    slowness = {
        stage * widest + replica: plan.configured_mesh.shards / of_usual
        for stage, replicas in enumerate(plan.stage_replicas.stages)
        for replica, of_usual in enumerate(usual_ranks(replicas, plan.slowness))
    }
    caps = _caps(plan)
    return scheduled_programs(
        plan.placement,
        number_of,
        entering_order(by_replica, widest_capacities(plan)),
        [
            sum(plan.layers[layer].forward_flops for layer in plan.layers_of(chunk))
            for chunk in range(len(plan.placement))
        ],
        slowness,
        {number: caps[number // widest] for number in slowness},
    )


def _caps(plan: Plan) -> tuple[int, ...]:
    """By stage, the most chunk activations that a stage replica may keep if stages differ, each of
    a whole micro-batch.

    A smaller replica may keep as many, though each is larger on its ranks: with fewer it would wait
    for other stages. `Roster.has_room` says whether they fit.
    """
    regular = list(map(plan.activation_bytes, plan.configured_layers))
    longest = -(-sum(map(len, plan.micro_batches)) // plan.configured_mesh.data)
    programs = compute_programs(
        plan.schedule, plan.configured_mesh.pipeline, plan.virtual, longest, plan.stretches
    )
    fullest = max(peak_in_flight(program, size=regular.__getitem__) for program in programs)
    most = (1 + plan.activation_headroom) * fullest
    whole = [plan.stretches * plan.activation_bytes(layers) for layers in plan.chunk_layers]
    return stage_caps(plan.placement, whole, most)
