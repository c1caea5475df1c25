"""What benchmarks/offload.py shows: memory and time by contestant, and what the processor did."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20


def split(steps: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Timed steps, and those whose memory was measured."""
    return [s for s in steps if "seconds" in s], [s for s in steps if "in_use" in s]


def table(results: dict[str, list[dict[str, Any]]], title: str) -> list[dict[str, Any]]:
    shown = Table(title=title)
    columns = ("contestant", "step s", "min..max", "x nothing", "cpu s", "in use MiB", "saved")
    for column in (*columns, "resident MiB", "saved", "sent MiB", "waited s", "MiB/s", "share"):
        shown.add_column(column, justify="left" if column == "contestant" else "right")
    use = Table(title=f"{title}: processor of a step")
    for column in ("contestant", "main thread s", "others s", "system s", "faults", "switches"):
        use.add_column(column, justify="left" if column == "contestant" else "right")
    base, base_memory = split(results["nothing"])
    highest = {key: max(s[key] for s in base_memory) for key in ("in_use", "resident")}
    rows = []
    for name, steps in results.items():
        timed, memory = split(steps)
        times = [step["seconds"] for step in timed]
        # Of the same round: what disturbs the machine hits all contestants of a round alike.
        ratios = [s["seconds"] / b["seconds"] for s, b in zip(timed, base, strict=True)]
        last = timed[-1]
        row: dict[str, Any] = {
            "contestant": name,
            "step_s": statistics.median(times),
            "times_s": times,
            "ratio": statistics.median(ratios),
            "last": last,
        }
        for key in ("processor", "main", "system", "faults", "switches"):
            row[key] = statistics.median(step[key] for step in timed)
        for key, without in highest.items():
            row[key] = max(step[key] for step in memory)
            row[f"{key}_saved"] = 1 - row[key] / without
        rows.append(row)
        sent = (
            (
                f"{last['sent'] / MIB:,.0f}/{last['eligible'] / MIB:,.0f}",
                f"{last['waited']:.3f}",
                f"{last['rate'] / MIB:,.0f}",
                f"{last['share']:.2f}",
            )
            if "sent" in last
            else ("", "", "", "")
        )
        shown.add_row(
            name,
            f"{row['step_s']:.3f}",
            f"{min(times):.3f}..{max(times):.3f}",
            f"{row['ratio']:.3f}",
            f"{row['processor']:.2f}",
            f"{row['in_use'] / MIB:,.0f}",
            f"{row['in_use_saved']:.0%}",
            f"{row['resident'] / MIB:,.0f}",
            f"{row['resident_saved']:.0%}",
            *sent,
        )
        use.add_row(
            name,
            f"{row['main']:.3f}",
            f"{row['processor'] - row['main']:.3f}",
            f"{row['system']:.3f}",
            f"{row['faults']:,.0f}",
            f"{row['switches']:,.0f}",
        )
    console = Console(width=150)
    console.print(shown)
    console.print(use)
    return rows
