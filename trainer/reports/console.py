"""The console of a run: a live panel on a terminal, one line per step elsewhere."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from holdfast.parallel.errors import printable
from holdfast.parallel.layout import LayerSpec
from holdfast.parallel.output import plain_console
from holdfast.parallel.plan import Plan


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """A step as it is shown."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_s: float
    left_s: float
    memory_gib: float | None
    eval_loss: float | None
    mfu: float | None
    offload: str = ""
    """The offloaded part of the activations, in words."""

    def line(self) -> str:
        """The step in one line of text."""
        parts = [
            f"step {self.step}/{self.steps}",
            f"loss {self.loss:.4f}",
            f"grad norm {self.grad_norm:.3f}",
            f"lr {self.lr:.2e}",
            f"{self.tokens_per_s:,.0f} tokens/s",
            f"left {duration(self.left_s)}",
        ]
        if self.memory_gib is not None:
            parts.insert(5, f"{self.memory_gib:.2f} GiB")
        if self.mfu is not None:
            parts.insert(5, f"mfu {self.mfu:.1%}")
        if self.eval_loss is not None:
            parts.append(f"held-out loss {self.eval_loss:.4f}")
        if self.offload:
            parts.append(self.offload)
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_MOST_COLUMNS = 16
"""The most replicas that have a column each; a table of more is wider than any terminal."""


def layout_grid(plan: Plan) -> Table:
    """The grid of stages (down) and replicas (across); each cell names its ranks and layers.

    With many replicas, a stage has one cell that counts its replicas and names their ranks.
    """
    if plan.stage_replicas.widest > _MOST_COLUMNS:
        return _layout_summary(plan)
    grid = Table(show_header=True, box=None, padding=(0, 1))
    places = plan.stage_replicas
    held_by = plan.configured_mesh.stage_replica_text if places.shards > 1 else ""
    grid.add_column(held_by, style="dim", no_wrap=True)
    for replica in range(places.widest):
        grid.add_column(f"replica {replica}", no_wrap=True)
    for stage in range(places.pipeline):
        first = places.rank(0, 0, stage)
        layers = ", ".join(_layers(plan, chunk) for chunk in plan.chunks_of(first))
        squares = []
        for replica, ranks in enumerate(places.stages[stage]):
            name = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_runs(ranks)}"
            suffix = "" if plan.is_regular else f" ({len(plan.micro_batches_of(stage, replica))})"
            squares.append(Text(f"■ {name}{suffix}", style="green"))
        squares += [Text("□", style="red")] * (places.widest - len(squares))
        grid.add_row(f"stage {stage}: {layers}", *squares)
    if plan.is_regular:
        counts = [Text(str(len(numbers)), style="dim") for numbers in plan.micro_batches]
        grid.add_row("micro-batches of a step", *counts)
    else:
        grid.add_row("(micro-batches of a step)")
    recomputed = recompute_summary(plan.layers)
    if recomputed:
        grid.caption, grid.caption_justify = f"recomputed: {recomputed}", "left"
    if places.spares:
        grid.add_row("spare", *(Text(f"rank {rank}", style="dim") for rank in places.spares[:1]))
    return grid


def _layout_summary(plan: Plan) -> Table:
    """The stages of a layout with many replicas, a row each."""
    grid = Table(show_header=True, box=None, padding=(0, 1))
    places = plan.stage_replicas
    for name in (
        "",
        f"replicas of {plan.configured_mesh.stage_replica_text}",
        "micro-batches of each",
        "ranks",
    ):
        grid.add_column(name)
    for stage, replicas in enumerate(places.stages):
        first = places.rank(0, 0, stage)
        layers = ", ".join(_layers(plan, chunk) for chunk in plan.chunks_of(first))
        counts = {len(plan.micro_batches_of(stage, number)) for number in range(len(replicas))}
        work = str(min(counts)) if len(counts) == 1 else f"{min(counts)}-{max(counts)}"
        ranks = _runs(sorted(rank for held in replicas for rank in held), most=_SHOWN_RUNS)
        grid.add_row(f"stage {stage}: {layers}", str(len(replicas)), work, ranks)
    captions = [f"recomputed: {text}"] if (text := recompute_summary(plan.layers)) else []
    captions += [f"{len(places.spares)} spare ranks"] if places.spares else []
    grid.caption, grid.caption_justify = "; ".join(captions) or None, "left"
    return grid


_SHOWN_RUNS = 4


def _runs(ranks: Sequence[int], most: int | None = None) -> str:
    """Ranks as runs of numbers, e.g. "0-3" or "1,4-6".

    Args:
        most: how many runs are shown; None: all.
    """
    found = [
        [number for _, number in run]
        for _, run in groupby(enumerate(ranks), key=lambda item: item[1] - item[0])
    ]
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in found[:most]]
    rest = len(found) - len(shown)
    return ",".join([*shown, *([f"… {rest} more runs"] if rest else [])])


def recompute_summary(layers: Sequence[LayerSpec]) -> str:
    """The layers recomputed in each way, and the operations that adds; empty if none is."""
    counts = Counter(layer.recompute for layer in layers if layer.recompute != "none")
    if not counts:
        return ""
    transformer = sum(layer.name.startswith("block.") for layer in layers)
    again = sum(layer.recompute_flops for layer in layers)
    added = again / (3 * sum(layer.forward_flops for layer in layers))
    parts = ", ".join(f"{count} {way}" for way, count in sorted(counts.items()))
    return f"{parts} of {transformer} layers ({added:.1%} more operations)"


def _layers(plan: Plan, chunk: int) -> str:
    names = [plan.layers[layer].name for layer in plan.layers_of(chunk)]
    numbers = [name.removeprefix("block.") for name in names if name.startswith("block.")]
    parts = [name for name in names if name == "embedding"]
    if numbers:
        last = numbers[-1]
        parts.append(f"layer {last}" if len(numbers) == 1 else f"layers {numbers[0]}-{last}")
    parts += [name for name in names if name == "head"]
    return " + ".join(parts)


_SHOWN_NOTES = 3


class Display:
    """Shows a run's progress on rank 0; other ranks have none."""

    def __init__(self, title: str, plan: Plan, *, every: int) -> None:
        self._title, self._plan, self._every = Text(printable(title)), plan, every
        self._console = plain_console(highlight=False)
        self._losses: list[float] = []
        self._notes: deque[str] = deque(maxlen=_SHOWN_NOTES)
        self._progress: ProgressLine | None = None
        self._live: Live | None = None

    def start(self) -> None:
        if self._console.is_terminal:
            self._live = Live(
                self._panel(None), console=self._console, refresh_per_second=8, transient=True
            )
            self._live.start()
        else:
            self._console.print(self._title)
            self._console.print(layout_grid(self._plan))

    def note(self, text: str) -> None:
        """Show a line beside the progress."""
        text = printable(text)
        if self._live is not None:
            self._notes.append(text)
            self._live.update(self._panel(self._progress))
        else:
            self._console.print(text, soft_wrap=True)

    def change(self, plan: Plan) -> None:
        """Show another plan from now on."""
        self._plan = plan
        if self._live is not None:
            self._live.update(self._panel(self._progress))
        else:
            self._console.print(layout_grid(plan))

    def show(self, progress: ProgressLine) -> None:
        self._losses.append(progress.loss)
        self._progress = progress
        if self._live is not None:
            self._live.update(self._panel(progress))
        elif (
            progress.step % self._every == 0
            or progress.step in (1, progress.steps)
            or progress.eval_loss is not None
        ):
            self._console.print(progress.line(), soft_wrap=True)

    def finish(self, summary: Sequence[tuple[str, str]]) -> None:
        """Replace the live panel by a summary of (what, value) rows."""
        self.close()
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in summary:
            table.add_row(name, printable(value))
        self._console.print(Panel(table, title=self._title, expand=False))

    def close(self) -> None:
        """Release the terminal; may be called again."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _panel(self, progress: ProgressLine | None) -> RenderableType:
        parts: list[RenderableType] = [layout_grid(self._plan), Text("")]
        if progress is None:
            parts.append(Text("starting", style="dim"))
        else:
            numbers = Table.grid(padding=(0, 3))
            shown = (
                ("step", f"{progress.step} / {progress.steps}"),
                ("loss", f"{progress.loss:.4f}"),
                ("tokens/s", f"{progress.tokens_per_s:,.0f}"),
                ("time left", duration(progress.left_s)),
                ("grad norm", f"{progress.grad_norm:.3f}"),
            )
            if progress.memory_gib is not None:
                shown = (*shown, ("memory", f"{progress.memory_gib:.2f} GiB"))
            numbers.add_row(*(Text(name, style="dim") for name, _ in shown))
            numbers.add_row(*(Text(value, style="bold") for _, value in shown))
            bar = ProgressBar(total=progress.steps, completed=progress.step, width=60)
            line = Table.grid()
            line.add_row(bar)
            parts += [numbers, Text(""), line, Text(sparkline(self._losses, 60), style="cyan")]
            if progress.eval_loss is not None:
                parts.append(Text(f"held-out loss {progress.eval_loss:.4f}"))
            if progress.offload:
                parts.append(Text(progress.offload))
        parts += [Text(note, style="dim", overflow="fold") for note in self._notes]
        return Panel(Group(*parts), title=self._title, expand=False)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as a row of block characters, averaged into at most `width` of them."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [
        sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)
    ]
    low, high = min(means), max(means)
    scale = 7.0 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[int((mean - low) * scale + 0.5)] for mean in means)
