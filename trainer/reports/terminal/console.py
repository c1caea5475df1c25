"""The console of a run: lines that stay, and on a terminal a live panel below them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from holdfast.parallel.errors import printable
from holdfast.parallel.output import ConsoleLog, plain_console, plain_text
from holdfast.parallel.plan import Plan
from holdfast.trainer.config import HELD_OUT
from holdfast.trainer.reports.terminal.layout_table import LayoutTable
from holdfast.trainer.reports.terminal.live_panel import LivePanel


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
    evaluated: Mapping[str, float]
    """The losses of validation sets after this step, by name; empty: it was not evaluated."""
    mfu: float | None
    offload: str = ""
    """The offloaded part of the activations, in words."""

    def line(self) -> str:
        """The step in one line of text, with numbers in the same columns in every line."""
        parts = [
            f"step {self.step:>{len(str(self.steps))}}/{self.steps}",
            f"loss {self.loss:7.4f}",
            f"grad norm {self.grad_norm:7.3f}",
            f"lr {self.lr:.2e}",
            f"{self.tokens_per_s:>9,.0f} tokens/s",
        ]
        if self.mfu is not None:
            parts.append(f"mfu {self.mfu:5.1%}")
        if self.memory_gib is not None:
            parts.append(f"memory {self.memory_gib:5.2f} GiB")
        parts.append(f"left {duration(self.left_s):>7}")
        parts += [f"{loss_name(name)} {loss:.4f}" for name, loss in self.evaluated.items()]
        if self.offload:
            parts.append(self.offload)
        return "  ".join(parts)


def loss_name(name: str) -> str:
    """What the loss of a validation set is called. Pure."""
    return f"{'held-out' if name == HELD_OUT else name} loss"


def duration(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Shows a run's progress in one process; the others have none.

    What it says is kept in a file, too. While it is open, it also says what this process writes to
    standard error, so that this does not end up within the panel.
    """

    def __init__(
        self,
        title: str,
        plan: Plan,
        *,
        every: int,
        log: Path,
        launched: bool = False,
        clock: Callable[[], float] = time.monotonic,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """Nothing is shown before `start`.

        Args:
            every: the steps from one line to the next.
            log: the file that keeps what is said.
            launched: whether another launcher has started this process: its terminal is then that
                launcher's, as mpirun gives one to processes whose output goes to a file. There is
                no panel then, unless the environment has TTY_INTERACTIVE=1.
        """
        self._title, self._plan, self._every = Text(printable(title)), plan, every
        plain = launched and environment.get("TTY_INTERACTIVE") != "1"
        self._console = plain_console(highlight=False, terminal=False if plain else None)
        began_s = clock()
        self._log, self._elapsed = ConsoleLog(log), lambda: duration(clock() - began_s)
        self._losses: list[float] = []
        self._evaluated: Mapping[str, float] = {}
        self._progress: ProgressLine | None = None
        self._said_step = 0
        """The last step that has a line."""
        self._panel: LivePanel | None = None
        self._errors = sys.stderr

    def start(self) -> None:
        """Show the title and the layout."""
        self._log.line(self._title.plain)
        self._log.text(plain_text(LayoutTable(self._plan)))
        self._errors = sys.stderr
        if self._console.is_interactive:
            self._panel = LivePanel(self._console, self._drawn)
        else:
            self._print(_stamped(self._title.plain))
            self._print(LayoutTable(self._plan))
        sys.stderr = _Lines(self.tell, self._errors)

    def note(self, text: str) -> None:
        """Say a line; it stays."""
        text = printable(text)
        self._log.line(text)
        self._print(_stamped(text))

    def tell(self, text: str) -> None:
        """Say a line that belongs to standard error."""
        text = printable(text)
        self._log.line(text)
        if self._panel is not None:
            self._panel.print(_stamped(text))
        else:
            self._errors.write(f"{text}\n")
            self._errors.flush()

    def tell_soon(self, text: str) -> None:
        """Say a line that belongs to standard error, from a signal's handler."""
        self._log.line(text)
        if self._panel is not None:
            self._panel.soon(_stamped(text).plain)
        else:
            with contextlib.suppress(OSError, ValueError):
                os.write(self._errors.fileno(), f"{text}\n".encode(errors="replace"))

    def change(self, plan: Plan) -> None:
        """Show another plan from now on."""
        self._plan = plan
        self._log.text(plain_text(LayoutTable(plan)))
        if self._panel is not None:
            self._panel.refresh()
        else:
            self._print(LayoutTable(plan))

    def show(self, progress: ProgressLine) -> None:
        """Show a step; every so many have a line, and those with a held-out loss."""
        self._losses.append(progress.loss)
        self._evaluated = progress.evaluated or self._evaluated
        self._progress = progress
        if (
            progress.step % self._every == 0
            or progress.step in (1, progress.steps)
            or progress.evaluated
        ):
            self._say_step(progress)
        elif self._panel is not None:
            self._panel.refresh()

    def finish(self, summary: Sequence[tuple[str, str]]) -> None:
        """Replace the live panel by a summary of (what, value) rows."""
        self.close()
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in summary:
            table.add_row(name, printable(value))
        shown = Panel(table, title=self._title, expand=False)
        self._log.text(plain_text(shown))
        self._log.close()
        self._print(shown)

    def close(self) -> None:
        """Say the last step, if it has no line, and release the terminal; may be called again."""
        if self._progress is not None and self._progress.step != self._said_step:
            self._say_step(self._progress)
        if sys.stderr is not self._errors and isinstance(sys.stderr, _Lines):
            sys.stderr = self._errors
        if self._panel is not None:
            self._panel.close()
            self._panel = None
        self._log.close()

    def _say_step(self, progress: ProgressLine) -> None:
        self._said_step = progress.step
        self.note(progress.line())

    def _print(self, shown: RenderableType) -> None:
        if self._panel is not None:
            self._panel.print(shown)
        else:
            self._console.print(shown, soft_wrap=isinstance(shown, Text))

    def _drawn(self) -> RenderableType:
        """What is in the panel now."""
        parts: list[RenderableType] = [LayoutTable(self._plan), Text("")]
        progress, elapsed = self._progress, self._elapsed()
        if progress is None:
            parts.append(Text(f"starting  {elapsed}", style="dim"))
        else:
            alive = self._plan.stage_replicas.size
            configured = self._plan.configured_mesh.size
            evaluated = [(loss_name(name), f"{loss:.4f}") for name, loss in self._evaluated.items()]
            shown = [
                ("step", f"{progress.step} / {progress.steps}"),
                ("loss", f"{progress.loss:.4f}"),
                *(evaluated or [(loss_name(HELD_OUT), "-")]),
                ("lr", f"{progress.lr:.2e}"),
                ("grad norm", f"{progress.grad_norm:.3f}"),
                ("tokens/s", f"{progress.tokens_per_s:,.0f}"),
                ("ranks alive", f"{alive} of {configured}"),
                ("elapsed", elapsed),
                ("time left", duration(progress.left_s)),
            ]
            if progress.memory_gib is not None:
                shown.append(("memory", f"{progress.memory_gib:.2f} GiB"))
            numbers = Columns((_number(*pair) for pair in shown), padding=(0, 3))
            bar = Table.grid()
            bar.add_row(ProgressBar(total=progress.steps, completed=progress.step, width=60))
            trend = Text(sparkline(self._losses, 60), style="cyan")
            parts += [numbers, Text(""), bar, trend]
            if progress.offload:
                parts.append(Text(progress.offload))
        return Panel(Group(*parts), title=self._title, expand=False)


class _Lines(io.TextIOBase):
    """A text stream that gives whole lines to a function, in the place of another stream."""

    def __init__(self, line: Callable[[str], None], replaced: TextIO) -> None:
        super().__init__()
        self._line, self._replaced, self._begun = line, replaced, ""

    def write(self, text: str, /) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._line(line)
        return len(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._replaced.isatty()

    def fileno(self) -> int:
        return self._replaced.fileno()


def _stamped(line: str) -> Text:
    """The line with the time of day."""
    return Text(f"{time.strftime('%H:%M:%S')} {line}")


def _number(name: str, value: str) -> Text:
    return Text.assemble((name, "dim"), "\n", (value, "bold"), no_wrap=True)


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
