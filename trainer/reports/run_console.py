"""The console of a run that shows committed steps, notes and the final summary."""

from __future__ import annotations

import os
import statistics
from collections.abc import Collection, Mapping

from holdfast.parallel.errors import counted
from holdfast.parallel.plan import Plan
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports.metrics import StepMetrics
from holdfast.trainer.reports.offload_metrics import described
from holdfast.trainer.reports.terminal import Display, ProgressLine, duration, loss_name
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.worlds import world_from_environment

_RECENT = 20
"""The number of steps for the shown rate and time left."""


class RunConsole:
    """Shows committed steps, notes and a summary. Local, in the one process that shows."""

    def __init__(self, run: RunDirectory, config: RunConfig, plan: Plan) -> None:
        """Start the display."""
        self._root, self._steps = run.root, config.train.steps
        self._losses: list[float] = []
        self._evaluated: Mapping[str, float] = {}
        self._step_times: list[float] = []
        self._step_tokens = 0.0
        self._lost = self._recoveries = self._repeated = 0
        self.display = Display(
            run.root.name,
            plan,
            every=config.log.every,
            log=run.console_log,
            launched=world_from_environment(os.environ) is not None,
        )
        self.display.start()

    def step(
        self,
        metrics: StepMetrics,
        *,
        memory_gib: float | None,
        mfu: float | None,
    ) -> None:
        """Show a committed step.

        Args:
            memory_gib: the peak of this rank.
            mfu: the model FLOPs utilisation in [0, 1]; None: unknown.
        """
        self._losses.append(metrics.loss)
        self._step_times.append(metrics.step_s)
        self._step_tokens = metrics.tokens_per_s * metrics.step_s
        self._evaluated = metrics.validation or self._evaluated
        recent_s = statistics.median(self._step_times[-_RECENT:])
        self.display.show(
            ProgressLine(
                step=metrics.step,
                steps=self._steps,
                loss=metrics.loss,
                grad_norm=metrics.grad_norm,
                lr=metrics.lr,
                tokens_per_s=self._step_tokens / recent_s,
                left_s=(self._steps - metrics.step) * recent_s,
                memory_gib=memory_gib,
                evaluated=metrics.validation,
                mfu=mfu,
                offload=described(metrics.offload) if metrics.offload is not None else "",
            )
        )

    def recovered(self, lost: Collection[int], *, repeated: int) -> None:
        """Count a change that the loss of ranks made necessary, for the summary.

        Args:
            repeated: the steps that the run repeats.
        """
        self._lost += len(lost)
        self._recoveries += 1
        self._repeated += repeated

    def finish(self, digest: str, total_s: float) -> None:
        """Show the summary of a run that has reached its last step.

        Args:
            digest: the digest of all parameters, in hexadecimal digits.
            total_s: the seconds since this start of the run.
        """
        made, took = len(self._losses), duration(total_s)
        if made == self._steps:
            summary = [("steps", f"{made} in {took}")]
        elif made:
            summary = [("steps", f"{self._steps}, of which {made} now, in {took}")]
        else:
            summary = [("steps", f"{self._steps}, all made before")]
        if made:
            summary.append(("loss", f"{self._losses[0]:.4f} -> {self._losses[-1]:.4f}"))
        summary += [(loss_name(name), f"{loss:.4f}") for name, loss in self._evaluated.items()]
        if made:
            speed = self._step_tokens / statistics.median(self._step_times)
            summary.append(("speed", f"{speed:,.0f} tokens/s (median step)"))
        if self._recoveries:
            parts = (
                counted(self._lost, "rank"),
                f"recoveries: {self._recoveries}",
                f"steps repeated: {self._repeated}",
            )
            summary.append(("lost", "; ".join(parts)))
        summary.append(("parameters", f"sha256 {digest[:16]}"))
        summary.append(("run", str(self._root)))
        self.display.finish(summary)

    def close(self) -> None:
        self.display.close()
