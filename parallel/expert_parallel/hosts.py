"""Which of the ranks that have an expert works for a slice. Pure; equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.parallel.pipeline import LayerHosts


def chosen_hosts(counts: Tensor, sources: Sequence[int], hosts: LayerHosts) -> Tensor:
    """The member that has each piece of work: int64[sources, slices, experts].

    An expert of one member works there. The others' work goes, the largest first, to the least
    loaded of the members that have the expert (longest processing time first, Graham 1969).

    Args:
        counts: int64[members, slices, experts]: the choices of each member's tokens; negative where
            there is no slice.
        sources: by member, the number of the slices that it has tokens of.
        hosts: by expert, the members that have it.
    """
    numbers = torch.zeros(max(sources) + 1, *counts.shape[1:], dtype=torch.int64)
    numbers.index_add_(0, torch.tensor(sources), counts.clamp(min=0))
    found = torch.tensor([members[0] for members in hosts]).expand(numbers.shape)
    shared = [expert for expert, members in enumerate(hosts) if len(members) > 1]
    if not shared:
        return found
    found = found.clone()
    load = torch.zeros(len(sources), dtype=torch.int64)
    single = torch.tensor([len(members) == 1 for members in hosts])
    load.index_add_(0, found[:, :, single].flatten(), numbers[:, :, single].flatten())
    loads = load.tolist()
    pieces = [
        (-count, source, slice_, shared[place])
        for source, of_source in enumerate(numbers[:, :, shared].tolist())
        for slice_, of_slice in enumerate(of_source)
        for place, count in enumerate(of_slice)
    ]
    for count, source, slice_, expert in sorted(pieces):
        member = min(hosts[expert], key=lambda host: (loads[host], host))
        loads[member] -= count
        found[source, slice_, expert] = member
    return found
