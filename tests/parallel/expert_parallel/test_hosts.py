"""Which copy of an expert works for a slice."""

from __future__ import annotations

import random

import torch
from hypothesis import given, strategies as st

from holdfast.parallel.expert_parallel.hosts import chosen_hosts


@given(st.integers(0, 2**32))
def test_each_piece_of_work_goes_to_one_rank_that_has_the_expert(seed: int) -> None:
    rng = random.Random(seed)
    sources = [k // 2 for k in range(rng.randint(1, 6))]
    experts, slices = rng.randint(1, 6), rng.randint(1, 3)
    members = range(len(sources))
    hosts = tuple(
        tuple(sorted(rng.sample(members, rng.randint(1, len(sources))))) for _ in range(experts)
    )
    shape = (len(sources), slices, experts)
    counts = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed % 2**31))
    if slices > 1:
        counts[:2, -1] = -1  # the first source has a slice less
    found = chosen_hosts(counts, sources, hosts)
    assert found.shape == (max(sources) + 1, slices, experts)
    load = [0] * len(sources)
    largest = 0
    for source, slice_, expert in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        here = [member for member in members if sources[member] == source]
        work = max(0, int(counts[here, slice_, expert].clamp(min=0).sum()))
        member = int(found[source, slice_, expert])
        assert member in hosts[expert]
        load[member] += work
        largest = max(largest, work)
    if all(len(own) == len(sources) for own in hosts):  # the largest goes first
        assert max(load) <= sum(load) / len(load) + largest


def test_equal_copies_share_the_work_of_equal_slices() -> None:
    counts = torch.tensor([[[8, 2]], [[8, 2]], [[8, 2]], [[8, 2]]])
    found = chosen_hosts(counts, (0, 1, 2, 3), ((0, 1), (2, 3)))
    assert sorted(found[:, 0, 0].tolist()) == [0, 0, 1, 1]
    assert sorted(found[:, 0, 1].tolist()) == [2, 2, 3, 3]
