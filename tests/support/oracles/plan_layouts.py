"""What a plan says that ranks hold, as layouts: for tests that covers and transfers fit them."""

from __future__ import annotations

from holdfast.parallel.layout import Box, Layout
from holdfast.parallel.plan import Plan, block_box


def parameter_layout(plan: Plan) -> Layout:
    """Which boxes of which logical tensors each rank's parameters are."""
    holdings: dict[int, dict[str, tuple[Box, ...]]] = {}
    for rank in plan.stage_replicas.ranks:
        mine = holdings.setdefault(rank, {})
        for chunk in plan.chunks_of(rank):
            for layer in plan.layers_of(chunk):
                for *_, spec in plan.rows_of(rank, layer):
                    mine[spec.name] = tuple({*mine.get(spec.name, ()), spec.box})
    return Layout(holdings)


def optimizer_layout(plan: Plan) -> Layout:
    """Which boxes of which logical tensors each rank keeps optimizer state for."""
    holdings: dict[int, dict[str, tuple[Box, ...]]] = {r: {} for r in plan.stage_replicas.ranks}
    for index, found in enumerate(plan.blocks):
        for block, owner in zip(found, plan.owners[index], strict=True):
            spec = plan.spec_of(block)
            mine = holdings[owner]
            mine[spec.name] = (*mine.get(spec.name, ()), block_box(spec, block))
    return Layout(holdings)
