"""The part of the plan report on offloaded activations: memory, bandwidth, the drive's life."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from holdfast.parallel.offload import OffloadEstimate, drive_life_years, estimate_offload
from holdfast.parallel.plan import Plan
from holdfast.trainer.config import RunConfig


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """The estimates for a rank of each pipeline stage."""

    where: str
    stages: tuple[OffloadEstimate, ...]
    drive_years: tuple[float | None, ...]
    """The years that each rank's own drive lasts; None without offload.drive_tbw and a step
    time."""

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values: the same facts as `renderable`."""
        return {
            "activations": self.where,
            "stages": [
                asdict(estimate) | {"stage": stage, "drive_years": years}
                for stage, (estimate, years) in enumerate(
                    zip(self.stages, self.drive_years, strict=True)
                )
            ],
        }

    def renderable(self) -> Table:
        """A table for a terminal."""
        title = f"activations offloaded ({self.where}), a rank of each stage, MiB"
        table = Table(title=title, title_justify="left")
        for column in ("stage", "share", "in memory", "saved", "written a step", "needs", "drive"):
            table.add_column(column, justify="right")
        for stage, (estimate, years) in enumerate(zip(self.stages, self.drive_years, strict=True)):
            needed = estimate.needed_bytes_per_s
            table.add_row(
                str(stage),
                f"{estimate.share:.0%}",
                f"{estimate.activations / 2**20:,.1f}",
                f"{estimate.saved / 2**20:,.1f}",
                f"{estimate.written_bytes / 2**20:,.1f}",
                "? (--tflops)" if needed is None else f"{needed / 1e9:.3g} GB/s",
                _drive(estimate.fast_enough, years),
            )
        return table


def _drive(fast_enough: bool | None, years: float | None) -> str:
    said = "?" if fast_enough is None else ("fast enough" if fast_enough else "too slow for all")
    return said if years is None else f"{said}, lasts {years:.1f} years"


def offload_plan(
    config: RunConfig,
    plan: Plan,
    *,
    flops_per_s: float,
    drive_bytes_per_s: float,
    step_s: float | None,
) -> OffloadPlan | None:
    """The estimates; None if nothing is offloaded. Pure.

    Args:
        flops_per_s: the rank's compute rate; 0: unknown.
        drive_bytes_per_s: the rate at which a rank can write; 0: unknown.
        step_s: the estimated time of a step; None: unknown.
    """
    offload = config.offload
    if offload.activations == "none":
        return None
    replica = max(range(plan.stage_replicas.widest), key=lambda d: (len(plan.micro_batches[d]), -d))
    stages = tuple(
        estimate_offload(
            plan,
            plan.stage_replicas.rank(0, replica, stage),
            most_share=offload.most_share,
            flops_per_s=flops_per_s,
            drive_bytes_per_s=drive_bytes_per_s,
        )
        for stage in range(plan.stage_replicas.pipeline)
    )
    years = tuple(
        None
        if step_s is None or offload.activations != "ssd"
        else drive_life_years(offload.drive_tbw * 1e12, estimate.written_bytes / step_s)
        for estimate in stages
    )
    return OffloadPlan(offload.activations, stages, years)
