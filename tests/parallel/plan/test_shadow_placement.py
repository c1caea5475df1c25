"""Shadows lie where their definition says, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, strategies as st

from holdfast.parallel.layout import StageReplicas
from holdfast.parallel.layout.mesh import AXES, Mesh
from holdfast.parallel.plan.shadow_placement import assign_shadows


def _replicas(tensor: int, data: int, pipeline: int) -> StageReplicas:
    degrees = {"tensor": tensor, "data": data, "pipeline": pipeline}
    sizes = tuple(degrees.get(axis, 1) for axis in AXES)
    return StageReplicas.of_mesh(Mesh(tuple(AXES.values()), sizes, tensor))


def _flaws(replicas: StageReplicas, owner: int, rank: int, node_of: Mapping[int, str]) -> int:
    """What a loss of the owner's node, stage replica, stage or data index takes along."""
    at, other = replicas.find(owner), replicas.find(rank)
    assert at is not None
    assert other is not None
    return (
        8 * (node_of[rank] == node_of[owner])
        + 4 * ((at.data, at.pipeline) == (other.data, other.pipeline))
        + 2 * (at.pipeline == other.pipeline)
        + (at.data == other.data)
    )


@given(
    sizes=st.lists(st.sampled_from([1, 5, 5, 100]), min_size=1, max_size=40),
    degrees=st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sampled_from([1, 2, 3])),
    per_node=st.sampled_from([1, 2, 4]),
    redundancy=st.integers(1, 3),
    seed=st.randoms(use_true_random=False),
)
def test_each_shadow_is_on_the_best_rank_with_the_least_load(
    sizes: Sequence[int],
    degrees: tuple[int, int, int],
    per_node: int,
    redundancy: int,
    seed: object,
) -> None:
    replicas = _replicas(*degrees)
    ranks = replicas.ranks
    node_of = {rank: f"node-{rank // per_node}" for rank in ranks}
    owners = [seed.choice(ranks) for _ in sizes]  # pyrefly: ignore[missing-attribute]
    load: dict[int, int] = {}
    found = assign_shadows(sizes, owners, replicas, node_of, redundancy, load=load)
    loads = dict.fromkeys(ranks, 0)
    for size, owner, shadows in zip(sizes, owners, found, strict=True):
        others = [rank for rank in ranks if rank != owner]
        assert len(shadows) == min(redundancy, len(others))
        for number, shadow in enumerate(shadows):
            earlier = shadows[:number]
            nodes = {node_of[rank] for rank in earlier}

            def cost(
                rank: int, owner: int = owner, nodes: set[str] = nodes
            ) -> tuple[int, bool, int]:
                flaws = _flaws(replicas, owner, rank, node_of)
                return flaws, node_of[rank] in nodes, loads[rank]

            assert cost(shadow) == min(cost(rank) for rank in others if rank not in earlier)
            loads[shadow] += size
    assert {rank: elements for rank, elements in loads.items() if elements} == load
