"""The audit of computation: a micro-batch is computed by two ranks, and what they get is compared.

A micro-batch's gradients have the same bits on any rank of its stage, so a difference means that
one of the ranks computes wrongly. Where they differ, others compute it once more to say which.
(ElasWave and others verify state; torchtitan's replay runs on the same ranks, which cannot see a
fault that stays.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator
from holdfast.parallel.keyed_random import stream_key
from holdfast.parallel.optimizer import ContributionDigests, operations_of
from holdfast.parallel.pipeline import Passage
from holdfast.parallel.plan import Plan
from holdfast.trainer.step.construction import ModelParts

Replicas = tuple[int, ...]
"""By stage, a replica of it."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The micro-batch of a step that is computed twice, and the replicas that do. Equal on all."""

    step: int
    """Counted from 0."""
    micro_batch: int
    audited: Replicas
    """Those that compute it in the step."""
    others: tuple[Replicas, ...]
    """By stage, the replicas that can compute it as well, in a drawn order."""

    @property
    def auditors(self) -> Replicas:
        """Those that compute it once more before."""
        return tuple(found[0] for found in self.others)

    def judges(self, stage: int) -> tuple[Replicas, ...]:
        """Those that compute it again, one after another, if the first difference is in a stage.

        A third replica of the stage decides; if there are only two, both try again. What is
        computed elsewhere is equal until then.
        """
        if len(self.others[stage]) < 2:
            return self.audited, self.auditors
        return (tuple(found[min(1, len(found) - 1)] for found in self.others),)


@dataclass(frozen=True, slots=True)
class WrongComputation:
    """The verdict on a difference. Equal on all ranks."""

    step: int
    micro_batch: int
    what: str
    """What differed first, for a person."""
    ranks: tuple[int, ...]
    """The ranks that computed wrongly; if it is not decided, those of which one did."""
    decided: bool

    def __str__(self) -> str:
        named = ", ".join(map(str, self.ranks))
        who = f"rank {named} computes" if self.decided else f"one of the ranks {named} computes"
        return (
            f"{who} wrongly: {self.what} of micro-batch {self.micro_batch} in step "
            f"{self.step + 1} differs between ranks"
        )


def audit_of(plan: Plan, seed: int, step: int, micro_batches: int) -> Audit | None:
    """The audit of a step, counted from 0; None if some stage has no second replica. Pure.

    Micro-batch and ranks are drawn from the seed and the step, so that each comes round.
    """
    draw = stream_key(seed, "audit", step)
    micro_batch = draw.key % micro_batches
    stages = range(plan.stage_replicas.pipeline)
    audited = tuple(_computing(plan, stage, micro_batch) for stage in stages)
    others = tuple(_others(plan, stage, audited[stage], draw.stream) for stage in stages)
    return Audit(step, micro_batch, audited, others) if all(others) else None


def _computing(plan: Plan, stage: int, micro_batch: int) -> int:
    replicas = range(plan.stage_replicas.replicas(stage))
    return next(r for r in replicas if micro_batch in plan.micro_batches_of(stage, r))


def _others(plan: Plan, stage: int, audited: int, draw: int) -> Replicas:
    """The other replicas of a stage with as many ranks, in a drawn order.

    In a regular plan the order is the same in all stages, so that each is one pipeline.
    """
    sizes = plan.stage_replicas.sizes(stage)
    found = [r for r, size in enumerate(sizes) if r != audited and size == sizes[audited]]
    first = draw % len(found) if found else 0
    return (*found[first:], *found[:first])


def plan_of_audit(plan: Plan, micro_batch: int, replicas: Replicas) -> Plan:
    """The plan by which only these replicas compute, and only this micro-batch. Pure."""
    rows = ((micro_batch,), *(() for _ in plan.micro_batches[1:]))
    assignment = tuple(
        tuple(
            (micro_batch,) if replica == replicas[stage] else ()
            for replica in range(plan.stage_replicas.replicas(stage))
        )
        for stage in range(plan.stage_replicas.pipeline)
    )
    return plan.evolved(micro_batches=rows, assignment=assignment)


class AuditWatch:
    """One rank's part in an audit: digests of what it computes for one micro-batch. Local.

    A row has, for each layer, what the micro-batch adds to the gradient sums, and for each chunk
    its output and the gradient of its input.
    """

    def __init__(self, plan: Plan, rank: int, model: ModelParts) -> None:
        self._plan, self._rank = plan, rank
        self._layers, self._chunks = len(plan.layers), len(plan.placement)
        places: dict[Hashable, tuple[int, int]] = {}
        for segment in model.buffer.segments:
            first, _ = model.buffer.place(segment.parameter)
            places.setdefault(segment.parameter, (segment.layer, first))
        self._places: Mapping[Hashable, tuple[int, int]] = places
        self.digests: ContributionDigests | None = None
        """Those that are being taken; None: none."""
        self._seen: dict[int, int] = {}

    @property
    def width(self) -> int:
        """The numbers of a row."""
        return self._layers + 2 * self._chunks

    def begin(self, micro_batch: int) -> ContributionDigests:
        """Take the digests of a micro-batch from now on."""
        self.digests, self._seen = ContributionDigests(micro_batch, self._places), {}
        return self.digests

    def see(self, chunk: int, passage: Passage, value: Tensor, forward: bool) -> None:
        """Note a chunk's output, or the gradient of its input."""
        if self.digests is not None and passage.micro_batch == self.digests.micro_batch:
            place = self._layers + 2 * chunk + (not forward)
            stretch = (passage.stretch or 0) * (1 << 40)
            flat = value.detach().contiguous().view(-1)
            (digest,) = operations_of(flat.device).bit_sums([(flat, stretch)])
            self._seen[place] = (self._seen.get(place, 0) + digest) % 2**64

    def end(self) -> Tensor:
        """The row of what was seen since `begin`: int64[width]."""
        assert self.digests is not None
        row = torch.zeros(self.width, dtype=torch.int64)
        for place, digest in (*self.digests.by_layer.items(), *self._seen.items()):
            row[place] = (digest + 2**63) % 2**64 - 2**63
        self.digests = None
        return row

    def table(self, rows: Sequence[tuple[Replicas, Tensor | None]]) -> Tensor:
        """This rank's part of the table of rows, zero elsewhere: int64[rows, shards, width].

        Args:
            rows: the replicas of each row, and what this rank saw for it.
        """
        places = self._plan.stage_replicas
        shards = max(max(places.sizes(stage)) for stage in range(places.pipeline))
        found = torch.zeros(len(rows), shards, self.width, dtype=torch.int64)
        at = places.find(self._rank)
        for number, (replicas, row) in enumerate(rows):
            if at is not None and row is not None and replicas[at.pipeline] == at.data:
                found[number, at.shard] = row
        return found


RunApart = Callable[[Plan, bool], None]
"""Computes by a plan without effect on the step; the flag says that the step has sums by then."""


class StepAudits:
    """One rank's part in the audits of steps. Exact-mode safe: no audit changes a bit."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        model: ModelParts,
        members: Communicator,
        run: RunApart,
        *,
        seed: int,
        every: int,
    ) -> None:
        """Nothing is audited yet. Local.

        Args:
            members: the communicator of all ranks.
            every: the steps between two audits; 0: there are none.
        """
        self._plan, self._rank, self._accumulator = plan, rank, model.accumulator
        self._members, self._run, self._seed, self._every = members, run, seed, every
        self._accumulator.watch(None)  # that of an interrupted step
        self.watch = AuditWatch(plan, rank, model)
        self._audit: Audit | None = None
        self._row: Tensor | None = None
        """What this rank has seen as an auditor."""

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 0, is audited. Pure."""
        return bool(self._every) and (step + 1) % self._every == 0

    def begin(self, step: int, micro_batches: int) -> None:
        """Compute the audited micro-batch as an auditor; watch it as its rank in the step.

        The step has no sums yet. Collective over the replicas that audit.
        """
        self._audit = audit_of(self._plan, self._seed, step, micro_batches)
        if self._audit is None:
            return
        self._row = self._computed(self._audit, self._audit.auditors, begun=False)
        if takes_part(self._plan, self._rank, self._audit.audited):
            self._accumulator.watch(self.watch.begin(self._audit.micro_batch))

    def _computed(self, audit: Audit, replicas: Replicas, *, begun: bool) -> Tensor | None:
        """The row of this rank as one of these replicas; None: it is none of them."""
        if not takes_part(self._plan, self._rank, replicas):
            return None
        self._accumulator.watch(self.watch.begin(audit.micro_batch))
        try:
            self._run(plan_of_audit(self._plan, audit.micro_batch, replicas), begun)
        finally:
            self._accumulator.watch(None)
        return self.watch.end()

    def finish(self) -> WrongComputation | None:
        """Compare what the ranks of the step's audit have seen. Collective over all ranks.

        Returns:
            What is wrong; None: nothing is, or the step has no audit.
        """
        audit, self._audit = self._audit, None
        if audit is None:
            return None
        self._accumulator.watch(None)
        own = None
        if self.watch.digests is not None:
            own = self.watch.end()
        rows = self._told([(audit.audited, own), (audit.auditors, self._row)])
        found = first_difference(self._plan, rows[0], rows[1])
        if found is None:
            return None
        judges = audit.judges(found.stage)
        again = [(replicas, self._computed(audit, replicas, begun=True)) for replicas in judges]
        return judged_audit(self._plan, audit, found, torch.cat([rows, self._told(again)]))

    def _told(self, rows: Sequence[tuple[Replicas, Tensor | None]]) -> Tensor:
        table = self.watch.table(rows)
        self._members.all_reduce(table).wait()
        return table


def passes_through(plan: Plan, rank: int, others: Sequence[int]) -> bool:
    """Whether a rank computes a micro-batch that one of the others computes a stage of. Pure."""

    def micro_batches(of: int) -> frozenset[int]:
        at = plan.stage_replicas.find(of)
        return frozenset() if at is None else frozenset(plan.micro_batches_of(at.pipeline, at.data))

    return any(micro_batches(rank) & micro_batches(other) for other in others)


def takes_part(plan: Plan, rank: int, replicas: Replicas) -> bool:
    """Whether a rank is one of these replicas. Pure."""
    at = plan.stage_replicas.find(rank)
    return at is not None and replicas[at.pipeline] == at.data


class RowDifference(NamedTuple):
    """Where two rows differ first, in the order of computation."""

    place: int
    """The place in a row."""
    stage: int
    what: str
    """What it is, for a person."""
    shards: tuple[int, ...]
    """Those that differ there."""


def first_difference(plan: Plan, first: Tensor, second: Tensor) -> RowDifference | None:
    """Where two rows, int64[shards, width], differ first; None: they are equal. Pure."""
    for place, stage, what in _in_order(plan):
        shards = (first[:, place] != second[:, place]).nonzero().flatten().tolist()
        if shards:
            return RowDifference(place, stage, what, tuple(shards))
    return None


def _in_order(plan: Plan) -> Iterator[tuple[int, int, str]]:
    """The places of a row in the order of computation, with the stage and a name."""
    layers, chunks = len(plan.layers), len(plan.placement)
    for chunk in range(chunks):
        yield layers + 2 * chunk, plan.placement[chunk], f"the output of {_named(plan, chunk)}"
    for chunk in reversed(range(chunks)):
        stage = plan.placement[chunk]
        for layer in reversed(plan.layers_of(chunk)):
            yield layer, stage, f"the gradient of {plan.layers[layer].name}"
        yield layers + 2 * chunk + 1, stage, f"the input's gradient of {_named(plan, chunk)}"


def _named(plan: Plan, chunk: int) -> str:
    names = [plan.layers[layer].name for layer in plan.layers_of(chunk)]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def judged_audit(plan: Plan, audit: Audit, found: RowDifference, rows: Tensor) -> WrongComputation:
    """The verdict on a difference of the audited and the auditors. Pure.

    Args:
        found: the difference.
        rows: int64[2 + judges, shards, width]: of the audited, the auditors and the judges.
    """
    places = plan.stage_replicas.stages[found.stage]

    def ranks(replicas: Replicas) -> tuple[int, ...]:
        return tuple(places[replicas[found.stage]][shard] for shard in found.shards)

    # What differs is compared alone: later results follow from it.
    audited, auditor, *again = (row[list(found.shards), found.place] for row in rows)
    with_auditor, with_audited = torch.equal(again[0], auditor), torch.equal(again[-1], audited)
    wrong = ranks(audit.audited) if with_auditor else ranks(audit.auditors)
    if decided := with_auditor != with_audited:
        return WrongComputation(audit.step, audit.micro_batch, found.what, wrong, decided)
    both = (*ranks(audit.audited), *ranks(audit.auditors))
    return WrongComputation(audit.step, audit.micro_batch, found.what, both, decided)
