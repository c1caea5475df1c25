"""The table of a layout: a cell per stage replica where there is room, else a line per stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from holdfast.parallel.errors import counted, named_ranks
from holdfast.parallel.layout import LayerSpec
from holdfast.parallel.plan import Plan

_MOST_COLUMNS = 16
"""The most replicas that have a column each."""
_UNBOUNDED = 1 << 16
"""A width in columns that no table of so many replicas needs."""


@dataclass(frozen=True, slots=True)
class LayoutTable:
    """The stages of a plan: which ranks hold which layers. It cuts no text, however narrow."""

    plan: Plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._form(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._form(console, options))

    def _form(self, console: Console, options: ConsoleOptions) -> RenderableType:
        """The grid if it fits, else the lines."""
        if self.plan.stage_replicas.widest > _MOST_COLUMNS:
            return _lines(self.plan)
        grid = _grid(self.plan)
        wide = options.update(width=_UNBOUNDED)
        fits = Measurement.get(console, wide, grid).maximum <= options.max_width
        return grid if fits else _lines(self.plan)


def _grid(plan: Plan) -> Table:
    """Stages (down) and replicas (across); each cell names its ranks."""
    grid = Table(show_header=True, box=None, padding=(0, 1))
    places = plan.stage_replicas
    held_by = plan.configured_mesh.stage_replica_text if plan.configured_mesh.shards > 1 else ""
    grid.add_column(held_by, style="dim", no_wrap=True)
    for replica in range(places.widest):
        grid.add_column(f"replica {replica}", no_wrap=True)
    for stage, replicas in enumerate(places.stages):
        squares = []
        for replica, ranks in enumerate(replicas):
            suffix = "" if plan.is_regular else f" ({len(plan.micro_batches_of(stage, replica))})"
            whole = len(ranks) == plan.configured_mesh.shards
            square, style = ("■", "green") if whole else ("◧", "yellow")
            squares.append(Text(f"{square} {named_ranks(ranks)}{suffix}", style=style))
        squares += [Text("□", style="red")] * (places.widest - len(squares))
        grid.add_row(f"stage {stage}: {_layers_of(plan, stage)}", *squares)
    if plan.is_regular:
        counts = [Text(str(len(numbers)), style="dim") for numbers in plan.micro_batches]
        grid.add_row("micro-batches of a step", *counts)
    else:
        grid.add_row("(micro-batches of a step)")
    if captions := _captions(plan):
        grid.caption, grid.caption_justify = "; ".join(captions), "left"
    return grid


def _lines(plan: Plan) -> Table:
    """A line per stage, which goes on below itself where it is too long."""
    lines = Table.grid(padding=(0, 1))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    places = plan.stage_replicas
    held_by = (
        f" x {plan.configured_mesh.stage_replica_text}" if plan.configured_mesh.shards > 1 else ""
    )
    for stage, replicas in enumerate(places.stages):
        counts = {len(plan.micro_batches_of(stage, number)) for number in range(len(replicas))}
        fewest = f"{min(counts)} to " if len(counts) > 1 else ""
        ranks = named_ranks(sorted(rank for held in replicas for rank in held), ", ")
        what = (
            f"{_layers_of(plan, stage)}: {ranks} ({counted(len(replicas), 'replica')}{held_by}, "
            f"{fewest}{counted(max(counts), 'micro-batch', 'micro-batches')} each)"
        )
        lines.add_row(f"stage {stage}:", Text(what))
    for caption in _captions(plan):
        lines.add_row("", Text(caption, style="dim"))
    return lines


def _captions(plan: Plan) -> list[str]:
    recomputed, spares = recompute_summary(plan.layers), plan.stage_replicas.spares
    found = [f"recomputed: {recomputed}"] if recomputed else []
    found += _smaller_replicas(plan)
    return [*found, f"spare: {named_ranks(spares, ', ')}"] if spares else found


def _smaller_replicas(plan: Plan) -> list[str]:
    """The stage replicas that have lost ranks, and their degrees, a text each. Pure."""
    return [
        f"◧ {named_ranks(replica)}: {plan.mesh_of(replica[0]).stage_replica_text}"
        for stage in plan.stage_replicas.stages
        for replica in stage
        if len(replica) < plan.configured_mesh.shards
    ]


def _layers_of(plan: Plan, stage: int) -> str:
    first = plan.stage_replicas.rank(0, 0, stage)
    return ", ".join(_layers(plan, chunk) for chunk in plan.chunks_of(first))


def _layers(plan: Plan, chunk: int) -> str:
    names = [plan.layers[layer].name for layer in plan.layers_of(chunk)]
    numbers = [name.removeprefix("block.") for name in names if name.startswith("block.")]
    parts = [name for name in names if name == "embedding"]
    if numbers:
        last = numbers[-1]
        parts.append(f"layer {last}" if len(numbers) == 1 else f"layers {numbers[0]}-{last}")
    parts += [name for name in names if name == "head"]
    return " + ".join(parts)


def recompute_summary(layers: Sequence[LayerSpec]) -> str:
    """The layers recomputed in each way, and the operations that adds; empty if none is."""
    transformer = [layer for layer in layers if layer.name.startswith("block.")]
    counts = Counter(layer.recompute for layer in transformer if layer.recompute != "none")
    logits = any(layer.vocab_chunk for layer in layers)
    if not counts and not logits:
        return ""
    again = sum(layer.recompute_flops for layer in layers)
    added = again / (3 * sum(layer.forward_flops for layer in layers))
    of_layers = ", ".join(f"{count} {way}" for way, count in sorted(counts.items()))
    parts = [f"{of_layers} of {len(transformer)} layers"] if counts else []
    parts += ["the logits"] if logits else []
    return f"{' and '.join(parts)} ({added:.1%} more operations)"
