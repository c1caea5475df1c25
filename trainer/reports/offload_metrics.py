"""Metrics of offloaded activations: for metrics.jsonl, TensorBoard and a person. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.parallel.offload import OffloadReport, drive_life_years


@dataclass(frozen=True, slots=True)
class OffloadMetrics:
    """The offload metrics of one step, of the rank that writes the records."""

    sent_bytes: int
    eligible_bytes: int
    """Bytes that could have been sent."""
    read_bytes: int
    bytes_per_s: float
    """The drive's rate in both directions while it was busy; 0 if it was not."""
    waited_s: float
    """Seconds that backward passes waited for the drive."""
    share: float
    """The share of the eligible bytes that was the aim."""
    drive_years: float | None
    """The years the drive lasts at this rate; None without offload.drive_tbw."""


def offload_metrics(
    report: OffloadReport, *, step_s: float, ranks_on_drive: int, drive_tbw: float
) -> OffloadMetrics:
    """The metrics of a step's report.

    Args:
        ranks_on_drive: the ranks that write to the same drive, each as much as this one.
        drive_tbw: the drive's rated endurance, in terabytes written.
    """
    written_per_s = report.sent_bytes * ranks_on_drive / step_s if step_s > 0 else 0.0
    return OffloadMetrics(
        sent_bytes=report.sent_bytes,
        eligible_bytes=report.eligible_bytes,
        read_bytes=report.read_bytes,
        bytes_per_s=report.bytes_per_s,
        waited_s=report.waited_s,
        share=report.share,
        drive_years=drive_life_years(drive_tbw * 1e12, written_per_s),
    )


def scalars(metrics: OffloadMetrics) -> dict[str, float]:
    """The metrics by their names in TensorBoard."""
    found = {
        "offload/sent(GiB)": metrics.sent_bytes / 2**30,
        "offload/read(GiB)": metrics.read_bytes / 2**30,
        "offload/rate(GB/s)": metrics.bytes_per_s / 1e9,
        "offload/waited(s)": metrics.waited_s,
        "offload/share": metrics.share,
    }
    if metrics.drive_years is not None:
        found["offload/drive_life(years)"] = metrics.drive_years
    return found


def described(metrics: OffloadMetrics) -> str:
    """The metrics in a few words, for the line of a step."""
    parts = [
        f"offload {metrics.sent_bytes / 2**20:,.0f} of {metrics.eligible_bytes / 2**20:,.0f} MiB"
    ]
    if metrics.bytes_per_s:
        parts.append(f"at {metrics.bytes_per_s / 1e9:.1f} GB/s")
    parts.append(f"waited {1000 * metrics.waited_s:.0f} ms")
    if metrics.drive_years is not None:
        parts.append(f"drive lasts {metrics.drive_years:.1f} years")
    return " ".join(parts)
