"""The placement of experts: which ranks have which, within teams of stage replicas.

A *team* is the fewest whole stage replicas of a stage whose ranks are a multiple of
`parallel.expert`. Its ranks send each other tokens, and together they have each expert: the same
ones as any other team, spread over as many ranks as the key says. After losses, a team takes in
what is left of others, so that no rank gets more experts than it needs to. Pure; needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

_EVEN = 1.05
"""The work of a rank over the mean that is even enough."""
_LEAST_GAIN = 1e-3
"""The share of its work of which a rank is relieved at least, when copies are exchanged."""
Hosts = tuple[tuple[int, ...], ...]
"""By expert, the ranks that have it."""


def stage_teams(sizes: Sequence[int], expert_ranks: int) -> tuple[range, ...]:
    """The replicas of each team of a stage.

    Args:
        sizes: the ranks of each replica.
        expert_ranks: the ranks over which a team has each expert once.
    """
    found: list[range] = []
    start = ranks = 0
    for replica, size in enumerate(sizes):
        ranks += size
        if ranks % expert_ranks == 0:
            found.append(range(start, replica + 1))
            start, ranks = replica + 1, 0
    if start < len(sizes):  # too few for a team of their own
        start = found.pop().start if found else start
        found.append(range(start, len(sizes)))
    return tuple(found)


def of_all_teams(of_teams: Sequence[Hosts]) -> Hosts:
    """The ranks of each expert, from those in each team of a stage."""
    return tuple(
        tuple(rank for ranks in of_expert for rank in ranks)
        for of_expert in zip(*of_teams, strict=True)
    )


def first_hosts(team: Sequence[int], experts: int, expert_ranks: int, copies: int = 1) -> Hosts:
    """The placement of a team's experts at first: neighbours together, as even as numbers allow.

    Args:
        team: its ranks, a multiple of `expert_ranks` or fewer.
        copies: those of each expert on `expert_ranks` ranks.
    """
    if not experts:
        return ()
    if copies == 1:
        blocks = max(1, len(team) // expert_ranks)
        size = len(team) // blocks
        return tuple(
            tuple(team[block * size + expert * size // experts] for block in range(blocks))
            for expert in range(experts)
        )
    wanted = even_copies(team, expert_ranks, copies)
    slots = -(-experts * wanted // len(team))
    return overlapping_hosts([wanted] * experts, team, slots)


def even_copies(team: Sequence[int], expert_ranks: int, copies: int) -> int:
    """The copies of each expert in a team, where all have as many.

    Args:
        copies: those on `expert_ranks` ranks.
    """
    return max(1, min(len(team), copies * len(team) // expert_ranks))


def copies_by_load(loads: Sequence[int], ranks: int, slots: int) -> list[int]:
    """The copies of each expert: in proportion to its load, by largest remainders; one at least.

    The copies of all fill the slots, as far as no rank has one twice (Lazarus, 2024).

    Args:
        loads: the choices of each expert.
        slots: the experts that each of the ranks has.
    """
    count, total = len(loads), max(1, sum(loads))
    free = max(0, ranks * slots - count)
    exact = [max(0.0, ranks * slots * load / total - 1) for load in loads]
    scale = free / sum(exact) if sum(exact) else 0.0
    more = [min(ranks - 1, int(amount * scale)) for amount in exact]
    order = sorted(range(count), key=lambda e: (more[e] - exact[e] * scale, e))
    left = free - sum(more)
    while left > 0 and any(number < ranks - 1 for number in more):
        for expert in order:
            if left > 0 and more[expert] < ranks - 1:
                more[expert] += 1
                left -= 1
    return [1 + number for number in more]


def overlapping_hosts(
    copies: Sequence[int], team: Sequence[int], slots: int, loads: Sequence[int] = ()
) -> Hosts:
    """The placement with maximum rank overlap: experts that are lost together are lost by few.

    Experts with as many copies share their ranks, so that fewer sets of lost ranks have all copies
    of some expert (Lazarus, 2024, section 4.2).

    Args:
        copies: of each expert, at most as many as there are ranks.
        slots: the experts that a rank has, at most; enough for one copy of each expert.
        loads: of each expert; those with as many copies are mixed by it.
    """
    order = _by_copies(copies, slots, loads or [0] * len(copies))
    held: list[set[int]] = [set() for _ in team]
    start = 0
    for first in range(0, len(order), slots):
        group = order[first : first + slots]
        stop = min(len(team), start + max(1, copies[group[0]]))
        for place in range(start, stop):
            held[place].update(group)
        start = stop if stop < len(team) else start
    left = {expert: copies[expert] - sum(expert in own for own in held) for expert in order}
    for expert in sorted(order, key=lambda e: (-left[e], e)):
        by_room = sorted(range(len(team)), key=lambda place: (len(held[place]), place))
        for place in by_room[: len(team) if left[expert] > 0 else 0]:
            if left[expert] > 0 and len(held[place]) < slots and expert not in held[place]:
                held[place].add(expert)
                left[expert] -= 1
    return tuple(
        tuple(team[place] for place, own in enumerate(held) if expert in own)
        for expert in range(len(copies))
    )


def _by_copies(copies: Sequence[int], slots: int, loads: Sequence[int]) -> list[int]:
    """The experts by copies; of as many, each run of `slots` has about as much load."""
    found: list[int] = []
    for number in sorted(set(copies)):
        run = [expert for expert, count in enumerate(copies) if count == number]
        run.sort(key=lambda expert: (-loads[expert], expert))
        groups = -(-len(run) // slots)
        for group in range(groups):
            found += run[group::groups]
    return found


def evened(hosts: Hosts, team: Sequence[int], slots: int, loads: Sequence[int]) -> Hosts:
    """The placement with copies of experts exchanged between ranks, so that none has far more work.

    Copies of an expert have equal shares of its work.

    Args:
        slots: the experts that a rank has, at most.
    """
    share = [load / len(ranks) for load, ranks in zip(loads, hosts, strict=True)]
    held = {rank: set[int]() for rank in team}
    held |= {rank: set(experts) for rank, experts in experts_by_rank(hosts).items()}
    work = {rank: sum(share[expert] for expert in held[rank]) for rank in team}
    enough = _EVEN * sum(work.values()) / len(team)
    while work[fullest := max(team, key=work.__getitem__)] > enough:
        by_work = sorted(team, key=work.__getitem__)
        exchanges = (_exchange(held, work, share, slots, fullest, rank) for rank in by_work)
        found = next((exchange for exchange in exchanges if exchange is not None), None)
        if found is None:
            break
        rank, experts = found
        for expert in experts:
            source, target = (fullest, rank) if expert in held[fullest] else (rank, fullest)
            held[source].remove(expert)
            held[target].add(expert)
            work[source] -= share[expert]
            work[target] += share[expert]
    return tuple(
        tuple(rank for rank in team if expert in held[rank]) for expert in range(len(hosts))
    )


def _exchange(
    held: Mapping[int, set[int]],
    work: Mapping[int, float],
    share: Sequence[float],
    slots: int,
    fullest: int,
    rank: int,
) -> tuple[int, tuple[int, ...]] | None:
    """The rank, and the expert that goes to it from the fullest, with one that comes for it.

    Those that even the two best; None: none lessens the work of the one with more.
    """
    gap = work[fullest] - work[rank]
    comes: list[tuple[int, ...]] = [(expert,) for expert in sorted(held[rank] - held[fullest])]
    if len(held[rank]) < slots:
        comes.append(())
    found = [
        (abs(gap / 2 - less), (expert, *other))
        for expert in sorted(held[fullest] - held[rank])
        for other in comes
        for less in (share[expert] - sum(share[e] for e in other),)
        if min(less, gap - less) > _LEAST_GAIN * work[fullest]
    ]
    return (rank, min(found)[1]) if found else None


def relabeled(hosts: Hosts, before: Hosts, team: Sequence[int]) -> Hosts:
    """The same placement with ranks exchanged, so that few experts move."""
    wanted, had = (experts_by_rank(placed) for placed in (hosts, before))
    overlaps = sorted(
        (-len(set(wanted.get(place, ())).intersection(had.get(rank, ()))), place, rank)
        for place in team
        for rank in team
    )
    taken: dict[int, int] = {}
    free = set(team)
    for _, place, rank in overlaps:
        if place not in taken and rank in free:
            taken[place] = rank
            free.discard(rank)
    return tuple(tuple(sorted(taken[place] for place in placed)) for placed in hosts)


def experts_by_rank(hosts: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """The experts of each rank that has any, ascending."""
    found: dict[int, list[int]] = {}
    for expert, ranks in enumerate(hosts):
        for rank in ranks:
            found.setdefault(rank, []).append(expert)
    return found


def unevenness(hosts: Hosts, teams: Sequence[Sequence[int]], loads: Sequence[int]) -> float:
    """The work of the rank with most over the mean of its team, in the team where that is most.

    Copies of an expert in a team share its work evenly.
    """
    team_of = {rank: number for number, team in enumerate(teams) for rank in team}
    work = dict.fromkeys(team_of, 0.0)
    for ranks, load in zip(hosts, loads, strict=True):
        here = [(rank, team_of[rank]) for rank in ranks if rank in team_of]
        copies = Counter(team for _, team in here)
        for rank, team in here:
            work[rank] += load / copies[team]
    most = max(work[rank] * len(team) for team in teams for rank in team)
    return most / max(1, sum(loads))


def next_hosts(before: Hosts, team: Sequence[int], *, levels: bool) -> Hosts:
    """The placement after a change of a team's ranks: experts stay where they are if they can.

    Those without a rank go to the ranks with the fewest.

    Args:
        before: by expert, the ranks that had it, of this team and others.
        levels: whether experts move from the ranks with most to those with fewest.
    """
    members = set(team)
    found = [[rank for rank in ranks if rank in members] for ranks in before]
    load = dict.fromkeys(team, 0) | {
        rank: len(experts) for rank, experts in experts_by_rank(found).items()
    }
    for ranks in found:
        if not ranks:
            rank = min(team, key=load.__getitem__)
            ranks.append(rank)
            load[rank] += 1
    if levels:
        _level(found, load)
    return tuple(map(tuple, found))


def _level(found: list[list[int]], load: dict[int, int]) -> None:
    """Move experts from the ranks with most to those with fewest, until these have one less."""
    held = {rank: list[int]() for rank in load} | experts_by_rank(found)
    while True:
        fullest, emptiest = max(load, key=load.__getitem__), min(load, key=load.__getitem__)
        if load[fullest] - load[emptiest] < 2:
            return
        known = set(held[emptiest])
        expert = next(e for e in reversed(held[fullest]) if e not in known)
        held[fullest].remove(expert)
        held[emptiest].append(expert)
        found[expert][found[expert].index(fullest)] = emptiest
        load[fullest] -= 1
        load[emptiest] += 1
