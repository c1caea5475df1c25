"""One rank of 8 or 16 is lost: editing the communicators against tearing all down and building them
again.

Layout: tensor 2 x pipeline 2, the rest data parallel. Timed on the survivors, from the moment at
which all know the new membership until all have used every group: a vote of all ranks, a tensor
all_reduce, a pipeline message, a message to each data-parallel peer. Rendezvous over one TCPStore.

- torch, rebuilt: gloo process groups (world, tensor, pipeline) destroyed and made anew, full
  meshes.
- holdfast, rebuilt: `build_groups` from nothing.
- holdfast, edit: nothing was under way, as when a rank leaves between two steps.
- holdfast, abort + edit: the others waited for the lost rank, or for those who did; includes the
  abort.

    python benchmarks/communicator_edit.py [--repetitions 9] [--json out.json]
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from harness import Measurement, report
from holdfast.parallel.comm.groups import Groups, build_groups, edit_groups, gloo_device
from holdfast.parallel.comm.protocol import Handle, MembershipChange
from holdfast.parallel.layout.mesh import Mesh
from support.processes.cluster import Cluster

LOST = 0
WAYS = ("torch, rebuilt", "holdfast, rebuilt", "holdfast, edit", "holdfast, abort + edit")


@dataclass(frozen=True, slots=True)
class RankGroups:
    """One rank's groups, with the lost rank or without it."""

    rank: int
    world: tuple[int, ...]
    tensor: tuple[int, ...]
    pipeline: tuple[int, ...]
    data: tuple[int, ...]

    @property
    def axes(self) -> dict[str, tuple[int, ...]]:
        return {"tensor": self.tensor, "pipeline": self.pipeline}

    def without(self, lost: int) -> RankGroups:
        def rest(ranks: Sequence[int]) -> tuple[int, ...]:
            return tuple(r for r in ranks if r != lost)

        return RankGroups(
            self.rank, *(rest(r) for r in (self.world, self.tensor, self.pipeline, self.data))
        )


def groups_of(mesh: Mesh, rank: int) -> RankGroups:
    at = mesh.coordinates(rank)
    return RankGroups(
        rank,
        tuple(range(mesh.size)),
        tuple(mesh.rank(s, at.data, at.pipeline) for s in range(mesh.shards)),
        mesh.pipeline_group(rank),
        tuple(mesh.rank(at.shard, d, at.pipeline) for d in range(mesh.data)),
    )


def use(groups: Groups, place: RankGroups) -> None:
    """The messages of a step, in small."""
    handles: list[Handle] = []
    for peer in place.data:
        if peer != place.rank:
            handles.append(groups.world.receive(torch.empty(256), peer, 5))
            handles.append(groups.world.send(torch.ones(256), peer, 5))
    for peer in place.pipeline:
        if peer != place.rank:
            handles.append(groups["pipeline"].receive(torch.empty(256), peer, 6))
            handles.append(groups["pipeline"].send(torch.ones(256), peer, 6))
    groups["tensor"].all_reduce(torch.ones(256)).wait()
    for handle in handles:
        handle.wait()
    groups.control.all_reduce(torch.ones(128, dtype=torch.float64)).wait()


class TorchGroups:
    """The same groups as torch has them: a full mesh of connections each."""

    def __init__(self, store: Any, place: RankGroups, generation: int, device: object) -> None:
        gloo: Any = dist.ProcessGroupGloo

        def group(kind: str, ranks: Sequence[int]) -> Any:
            options = gloo._Options()
            options._devices = [device]
            options._timeout = timedelta(seconds=60)
            prefixed = dist.PrefixStore(f"{kind}/{ranks[0]}/{generation}", store)
            return gloo(prefixed, ranks.index(place.rank), len(ranks), options)

        self.place = place
        self.world = group("world", place.world)
        self.tensor = group("tensor", place.tensor) if len(place.tensor) > 1 else None
        self.pipeline = group("pipeline", place.pipeline) if len(place.pipeline) > 1 else None

    def use(self) -> None:
        place, works = self.place, []
        for group, ranks, peers in (
            (self.world, place.world, place.data),
            (self.pipeline, place.pipeline, place.pipeline),
        ):
            for peer in peers:
                if peer != place.rank:
                    works.append(group.recv([torch.empty(256)], ranks.index(peer), 5))
                    works.append(group.send([torch.ones(256)], ranks.index(peer), 5))
        if self.tensor is not None:
            self.tensor.allreduce([torch.ones(256)], dist.AllreduceOptions()).wait()
        for work in works:
            work.wait()
        vote = torch.ones(128, dtype=torch.float64)
        self.world.allreduce([vote], dist.AllreduceOptions()).wait()


def wait_in_vain(groups: Groups, mesh: Mesh, rank: int) -> list[Handle]:
    """What a rank has under way when another is lost in its pipeline's compute.

    The lost rank's replica waits inside its tensor and pipeline groups; the other replicas are
    through with theirs and wait for gradients of that replica.
    """
    here, lost = mesh.coordinates(rank), mesh.coordinates(LOST)
    if here.data != lost.data:
        peer = mesh.rank(here.shard, lost.data, here.pipeline)
        return [
            groups.world.receive(torch.empty(256), peer, 8),
            groups.world.send(torch.ones(256), peer, 9),
        ]
    pending = [
        groups["pipeline"].receive(torch.empty(256), peer, 8)
        for peer in groups["pipeline"].ranks
        if peer != rank
    ]
    if groups["tensor"].size > 1:
        pending.append(groups["tensor"].all_reduce(torch.ones(256)))
    return pending


def lose_one(
    rank: int, world_size: int, store: Any, *, data: int, repetitions: int
) -> list[tuple[str, int, float, float]]:
    """(way, repetition, start, stop) of this rank for every way and repetition, in turn."""
    mesh = Mesh.of(tensor=2, data=data, pipeline=2)
    before = groups_of(mesh, rank)
    after = before.without(LOST)
    change = {"left": frozenset({LOST})}
    device = gloo_device("127.0.0.1")
    generation = 0
    times = []

    def meet(what: str) -> None:
        """All ranks come out at about the same time."""
        if store.add(f"{what}/count", 1) == world_size:
            store.set(f"{what}/go", "1")
        store.wait([f"{what}/go"])

    def build(place: RankGroups) -> Groups:
        return build_groups(
            store,
            "127.0.0.1",
            rank,
            place.world,
            place.axes,
            backend="gloo",
            generation=generation,
            timeout_s=60.0,
        )

    for repetition in range(repetitions + 1):
        for way in WAYS:
            generation += 2
            groups: Any = (
                TorchGroups(store, before, generation, device) if "torch" in way else build(before)
            )
            (groups.use if "torch" in way else (lambda g=groups: use(g, before)))()
            pending = wait_in_vain(groups, mesh, rank) if "abort" in way else []
            gc.collect()
            meet(f"{way}/{repetition}")
            if rank != LOST:
                generation += 1
                start = time.monotonic()
                if "torch" in way:
                    groups = None
                    renewed = TorchGroups(store, after, generation, device)
                    renewed.use()
                else:
                    if "rebuilt" in way:
                        groups.abort("torn down")
                        groups = build(after)
                    else:
                        if pending:
                            groups.abort("rank 0 is lost")
                        groups = edit_groups(
                            groups,
                            MembershipChange(generation, kept=not pending, **change),
                            after.world,
                            after.axes,
                        )
                    use(groups, after)
                    renewed = groups
                times.append((way, repetition, start, time.monotonic()))
                generation -= 1
            meet(f"{way}/{repetition}/end")
            groups = renewed = None
            pending.clear()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows, baseline = [], {}
    for ranks in (8, 16):
        cluster = Cluster(workers=ranks)
        by_rank = cluster.run(
            "communicator_edit:lose_one",
            ranks,
            timeout_s=300,
            data=ranks // 4,
            repetitions=arguments.repetitions,
        )
        cluster.close()
        for way in WAYS:
            spans = [
                (
                    min(start for w, r, start, _ in all_times if (w, r) == (way, repetition)),
                    max(stop for w, r, _, stop in all_times if (w, r) == (way, repetition)),
                )
                for all_times in ([entry for times in by_rank for entry in times],)
                for repetition in range(1, arguments.repetitions + 1)
            ]
            row = Measurement(f"{ranks} ranks: {way}", tuple(b - a for a, b in spans))
            rows.append(row)
            if way == WAYS[0]:
                torch_s = row.median_s
            baseline[row.name] = torch_s
    report(
        "one rank lost: until every group has been used again",
        rows,
        baseline,
        json_path=arguments.json,
        note="ratio = time / torch's teardown and rebuild of the same groups",
    )


if __name__ == "__main__":
    main()
