"""The answer of the round that agrees on a generation, and the workers that may have missed it.

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from holdfast.elastic.agreement.reports import AcceptorState, Identities, Report
from holdfast.elastic.generation import Generation, Identity, Member


def generation_of(acceptor: AcceptorState, reports: Mapping[Identity, Report]) -> Generation:
    """The generation of a verdict "agreed", from that round's reports; equal on all members."""
    members = (reports[identity] for identity in sorted(acceptor.members))
    return Generation(acceptor.generation, tuple(map(_member, members)))


def _member(r: Report) -> Member:
    told = (r.node, r.store, r.held, r.step, r.phase, r.leaving, dict(r.data), r.machine)
    return Member(r.identity, *told)


def misses_answer(report: Report, generation: Generation) -> bool:
    """Whether a worker only has to be told of a generation, because it missed the answer."""
    own, acceptor = report.identity, report.acceptor
    bound = acceptor.generation == generation.number and acceptor.accepted
    if report.settled or not report.alive or own not in generation.identities or bound:
        return False
    if report.held >= generation.number or acceptor.generation > generation.number:
        return False
    told = generation.member(own.rank)
    return json.dumps(told.fields, sort_keys=True) == json.dumps(
        _member(report).fields, sort_keys=True
    )


def aware(chosen: AcceptorState, reports: Mapping[Identity, Report]) -> Identities:
    """The workers of a round that know of a generation, or have ended."""
    return frozenset(
        identity
        for identity, report in reports.items()
        if report.acceptor.generation >= chosen.generation or not report.alive
    )


def needs_another(report: Report, generation: Generation) -> bool:
    """Whether a member takes part again that this generation does not serve, or has ended."""
    inside = report.identity in generation.identities and not report.settled
    return inside and not misses_answer(report, generation)
