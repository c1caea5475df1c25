"""What every benchmark shares: alternating repetitions, medians with spread, a table and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

TRILLION: Mapping[str, object] = {
    "family": "llama",
    "layers": 160,
    "hidden": 25600,
    "intermediate": 68608,
    "heads": 200,
    "kv_heads": 8,
    "vocab": 131072,
    "max_seq_len": 4096,
}
"""The `[model]` section of a trillion parameters, for what is planned without tensors."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Repeated times of one contestant."""

    name: str
    times_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def spread(self) -> str:
        return f"{min(self.times_s) * 1e3:.1f}..{max(self.times_s) * 1e3:.1f}"


def status_bytes(name: str) -> int:
    """A size of this process, by its name in /proc/self/status: VmRSS, or VmHWM, the highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def forget_highest() -> None:
    """Have VmHWM begin again at VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def alternate(
    contestants: Mapping[str, Callable[[], float]], repetitions: int
) -> list[Measurement]:
    """Run every contestant once per repetition, in turn, so that drifts of the machine hit all
    alike.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, run in contestants.items():
            times[name].append(run())
    return [Measurement(name, tuple(values)) for name, values in times.items()]


def machine() -> dict[str, object]:
    """What the results were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(
    title: str,
    rows: Sequence[Measurement],
    baseline: Mapping[str, float],
    *,
    json_path: str | None = None,
    note: str = "",
    columns: Mapping[str, Mapping[str, float]] | None = None,
    record: Mapping[str, object] | None = None,
) -> None:
    """Print the table and, if asked, write it as JSON.

    Args:
        baseline: contestant name -> the time in seconds that its ratio is against.
        columns: further columns: title -> contestant name -> value.
        record: what the JSON holds besides.
    """
    columns = columns or {}
    table = Table(title=title, caption=note or None)
    for column in ("contestant", "median ms", "min..max ms", "ratio", *columns):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for row in rows:
        ratio = f"{row.median_s / baseline[row.name]:.3f}" if row.name in baseline else "-"
        more = (f"{values[row.name]:.2f}" for values in columns.values())
        table.add_row(row.name, f"{row.median_s * 1e3:.1f}", row.spread, ratio, *more)
    Console(width=120).print(table)
    if json_path:
        written = {
            "title": title,
            "machine": machine(),
            "note": note,
            **(record or {}),
            "rows": [
                asdict(row)
                | {"median_s": row.median_s}
                | {"ratio": row.median_s / baseline[row.name] if row.name in baseline else None}
                | {title: values[row.name] for title, values in columns.items()}
                for row in rows
            ],
        }
        Path(json_path).write_text(json.dumps(written, indent=2) + "\n")
