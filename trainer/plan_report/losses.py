"""The part of the plan report on shadows, and on the plan after a loss. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.optimizer import StateFormat
from holdfast.parallel.plan import (
    BlockKey,
    Plan,
    Roster,
    held_blocks,
    keeps_parameters,
    plan_block_transfers,
    replan,
    with_shadows,
)
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports import LayoutTable
from holdfast.trainer.step import room_of, shadows_in_host_memory, state_format


@dataclass(frozen=True, slots=True)
class LossReport:
    """The consequences of a loss of ranks."""

    lost: tuple[int, ...]
    plan: Plan
    """The plan of the remaining ranks."""
    without_copy: int
    """The number of blocks without a copy; if there are any, the newest checkpoint is loaded."""
    moved_bytes: int
    """The bytes of optimizer state that all ranks send."""
    slowdown: float
    """The busiest rank's computation relative to before; 1 is as fast as before."""

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "ranks": list(self.lost),
            "blocks_without_copy": self.without_copy,
            "moved_bytes": self.moved_bytes,
            "slowdown": self.slowdown,
            "cells": self.plan.stage_replicas.stages,
            "spares": list(self.plan.stage_replicas.spares),
            "micro_batches": [
                [
                    list(self.plan.micro_batches_of(stage, r))
                    for r in range(self.plan.stage_replicas.replicas(stage))
                ]
                for stage in range(self.plan.stage_replicas.pipeline)
            ],
        }


@dataclass(frozen=True, slots=True)
class ElasticReport:
    """The shadows of a configuration and their cost on the rank that bears most."""

    redundancy: int
    nodes: int
    shadow_bytes: int
    """The memory of one rank's copies, with the gradients that it receives for them."""
    traffic_bytes: int
    """The bytes of gradients that one rank sends to shadows in a step."""
    spared_bytes: int
    """The bytes of parameters that it need not send for it, because shadows update their own."""
    unsafe_blocks: int
    """The number of blocks with all copies on one node."""
    loss: LossReport | None

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values: the same facts as `renderable`."""
        return {
            "redundancy": self.redundancy,
            "nodes": self.nodes,
            "shadow_bytes": self.shadow_bytes,
            "shadow_traffic_bytes": self.traffic_bytes,
            "spared_parameter_bytes": self.spared_bytes,
            "blocks_on_one_node": self.unsafe_blocks,
            "lost": None if self.loss is None else self.loss.as_dict(),
        }

    def renderable(self) -> RenderableType:
        """The report for a terminal."""
        facts = Table.grid(padding=(0, 2))
        if self.redundancy:
            value = (
                f"{self.redundancy} per block over {self.nodes} nodes; the fullest rank keeps "
                f"{self.shadow_bytes / 2**20:,.1f} MiB and sends "
                f"{self.traffic_bytes / 2**20:,.1f} MiB of gradients a step, and "
                f"{self.spared_bytes / 2**20:,.1f} MiB less of parameters"
            )
        else:
            value = "none (elastic.redundancy = 0): state that is lost comes from a checkpoint"
        facts.add_row(Text("shadows", style="dim"), value)
        if self.unsafe_blocks:
            facts.add_row(
                "",
                Text(
                    f"{self.unsafe_blocks} blocks have all their copies on one node: losing it "
                    "needs a checkpoint",
                    style="yellow",
                ),
            )
        if self.loss is None:
            return facts
        loss = self.loss
        state = (
            f"{loss.moved_bytes / 2**20:,.1f} MiB of state moves; no step is lost"
            if not loss.without_copy
            else f"{loss.without_copy} blocks have no copy left: the newest checkpoint is loaded"
        )
        facts.add_row(
            Text(f"without {', '.join(map(str, loss.lost))}", style="dim"),
            f"{state}; the busiest rank computes {loss.slowdown:.2f} times as much",
        )
        return Group(facts, Text(""), LayoutTable(loss.plan))


def elastic_report(
    config: RunConfig, plan: Plan, *, ranks_per_node: int = 0, lost: Collection[int] = ()
) -> ElasticReport:
    """The cost of shadows, and the consequences of a loss. Pure.

    Args:
        ranks_per_node: 0: the value from `elastic.local_nodes`.
        lost: the ranks that are lost.
    Raises:
        ConfigError: `lost` has ranks outside the layout, or leaves too few.
    """
    ranks = plan.stage_replicas.ranks
    wrong = sorted(set(lost) - set(ranks))
    if wrong:
        raise ConfigError(f"--lost {wrong[0]}: the layout has ranks 0 to {ranks[-1]}")
    node_of = _nodes(config, len(ranks), ranks_per_node)
    redundancy = config.elastic.redundancy
    plan = with_shadows(plan, Roster(ranks, node_of), redundancy)
    kept, sent, spared = (dict.fromkeys(ranks, 0) for _ in range(3))
    unsafe = 0
    for index, shadows in enumerate(plan.shadows):
        for block, owner, holders in zip(
            plan.blocks[index], plan.owners[index], shadows, strict=True
        ):
            sent[owner] += block.elements * len(holders)
            users = sum(keeps_parameters(plan, block, rank) for rank in holders)
            spared[owner] += block.elements * users
            for holder in holders:
                kept[holder] += block.elements
            unsafe += len({node_of[rank] for rank in (owner, *holders)}) == 1
    form = state_format(config)
    width = form.precision.state.bytes
    return ElasticReport(
        redundancy=redundancy,
        nodes=len(set(node_of.values())),
        shadow_bytes=max(kept.values()) * (width + form.held_bytes + _rounded_width(config, form)),
        traffic_bytes=max(sent.values()) * width,
        spared_bytes=spared[max(sent, key=sent.__getitem__)] * form.precision.bytes,
        unsafe_blocks=unsafe,
        loss=_loss(config, plan, set(lost), node_of, form.held_bytes) if lost else None,
    )


def _rounded_width(config: RunConfig, form: StateFormat) -> int:
    """The bytes per element of parameters that shadows in host memory keep for checkpoints."""
    rounds = form.precision.has_master and shadows_in_host_memory(config, config.train.device)
    return form.precision.bytes if rounds else 0


def _nodes(config: RunConfig, ranks: int, ranks_per_node: int) -> dict[int, str]:
    if ranks_per_node:
        return {rank: f"node{rank // ranks_per_node}" for rank in range(ranks)}
    nodes = min(config.elastic.local_nodes, ranks)
    return {
        rank: f"node{node}"
        for node in range(nodes)
        for rank in range(node * ranks // nodes, (node + 1) * ranks // nodes)
    }


def _loss(
    config: RunConfig, plan: Plan, lost: set[int], node_of: Mapping[int, str], state_bytes: int
) -> LossReport:
    redundancy = config.elastic.redundancy
    living = tuple(rank for rank in plan.stage_replicas.ranks if rank not in lost)
    roster = Roster(living, node_of, has_room=room_of(config, 0))
    after = replan(plan, roster, generation=1, redundancy=redundancy)
    held = held_blocks(plan, living)
    needed = held_blocks(after, after.stage_replicas.ranks)
    known: set[BlockKey] = set().union(*held.values())
    wanted: set[BlockKey] = set().union(*needed.values())
    reachable = {rank: known.intersection(keys) for rank, keys in needed.items()}
    moved = sum(
        size
        for transfer in plan_block_transfers(plan, held, reachable, node_of)
        for size in transfer.sizes
    )
    return LossReport(
        lost=tuple(sorted(lost)),
        plan=after,
        without_copy=len(wanted - known),
        moved_bytes=moved * state_bytes,
        slowdown=_busiest(after) / _busiest(plan),
    )


def _busiest(plan: Plan) -> float:
    """The operations of the forward passes of the stage replica that has most, by its ranks."""
    work = [0.0] * plan.stage_replicas.pipeline
    for chunk, stage in enumerate(plan.placement):
        work[stage] += sum(plan.layers[layer].forward_flops for layer in plan.layers_of(chunk))
    return max(
        work[stage] * len(plan.micro_batches_of(stage, replica)) / size
        for stage in range(plan.stage_replicas.pipeline)
        for replica, size in enumerate(plan.stage_replicas.sizes(stage))
    )
