"""Messages between stage replicas of any two sizes: each rank gets the tokens it needs, once."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from holdfast.parallel.layout.mesh import AXES, Mesh
from holdfast.parallel.layout.stage_boundary import boundary_routes, unit_rows
from holdfast.parallel.pipeline.executor import MessageShape

TOKENS = 32


def meshes(*, sequence_parallel: bool) -> list[Mesh]:
    sizes = tuple({"tensor": 4, "context": 4}.get(axis, 1) for axis in AXES)
    whole = Mesh(tuple(AXES.values()), sizes, 4, 8, sequence_parallel)
    return list(whole.by_replica_size.values())


def test_smaller_meshes_prefer_to_keep_parameters_split() -> None:
    found = {mesh.shards: (mesh.tensor, mesh["context"]) for mesh in meshes(sequence_parallel=True)}
    assert found == {16: (4, 4), 8: (4, 2), 4: (4, 1), 2: (2, 1), 1: (1, 1)}


def test_without_constant_parts_the_tensor_degree_stays() -> None:
    sizes = tuple({"tensor": 2, "context": 2}.get(axis, 1) for axis in AXES)
    assert list(Mesh(tuple(AXES.values()), sizes, 1, 4).by_replica_size) == [4, 2]


def shaped(state: torch.Tensor, rows: tuple[slice, ...]) -> MessageShape:
    return MessageShape(tuple(state.shape), state.dtype, state.device, lambda peer, sends: rows)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_hidden_state_crosses_any_boundary_unchanged(*, sequence_parallel: bool) -> None:
    values = torch.randn(TOKENS, 2, 3)
    for sender, receiver in product(meshes(sequence_parallel=sequence_parallel), repeat=2):
        of_unit = TOKENS // sender.units
        assert sender.units == receiver.units == 1 + max(map(max, sender.token_units))

        def state(mesh: Mesh, shard: int, of_unit: int = of_unit) -> torch.Tensor:
            rows = [values[u * of_unit : (u + 1) * of_unit] for u in mesh.token_units[shard]]
            return torch.cat(rows)

        routes = boundary_routes(sender, receiver)
        for shard, sources in enumerate(routes):
            whole = state(receiver, shard)
            joined = None
            for source, crossing in sources.items():
                sent = unit_rows(sender.token_units[source], crossing, of_unit)
                taken = unit_rows(receiver.token_units[shard], crossing, of_unit)
                out, into = shaped(whole, sent), shaped(whole, taken)
                message = out.cut(state(sender, source), 0)
                assert message.shape == into.buffer(0).shape
                joined = into.joined(joined, message, 0)
            assert joined is not None
            assert torch.equal(joined, whole)


def test_receivers_are_divided_among_the_ranks_that_have_the_same_tokens() -> None:
    whole, *_, alone = meshes(sequence_parallel=False)
    assert [len(sources) for sources in boundary_routes(whole, alone)] == [4]
    assert [list(sources) for sources in boundary_routes(whole, whole)] == [[k] for k in range(16)]
