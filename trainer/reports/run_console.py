"""The console of a run that shows committed steps, notes and the final summary."""

from __future__ import annotations

import statistics
from pathlib import Path

from holdfast.parallel.plan import Plan
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports.console import Display, ProgressLine, duration
from holdfast.trainer.reports.metrics import StepMetrics
from holdfast.trainer.reports.offload_metrics import described

_RECENT = 20
"""The number of steps for the shown rate and time left."""


class RunConsole:
    """Shows committed steps, notes and a summary. Local, on the rank that shows."""

    def __init__(self, root: Path, config: RunConfig, plan: Plan, *, step_tokens: int) -> None:
        """Start the display.

        Args:
            step_tokens: the tokens of one step, over all ranks.
        """
        self._root, self._steps, self._step_tokens = root, config.train.steps, step_tokens
        self._losses: list[float] = []
        self._eval_loss: float | None = None
        self._step_times: list[float] = []
        self._display = Display(root.name, plan, every=config.log.every)
        self._display.start()

    def note(self, text: str) -> None:
        """Show a line beside the progress."""
        self._display.note(text)

    def step(
        self,
        metrics: StepMetrics,
        *,
        memory_gib: float,
        mfu: float | None,
        eval_loss: float | None,
    ) -> None:
        """Show a committed step.

        Args:
            memory_gib: the peak of this rank.
            mfu: the model FLOPs utilisation in [0, 1]; None: unknown.
        """
        self._losses.append(metrics.loss)
        self._step_times.append(metrics.step_s)
        self._eval_loss = eval_loss if eval_loss is not None else self._eval_loss
        recent_s = statistics.median(self._step_times[-_RECENT:])
        self._display.show(
            ProgressLine(
                step=metrics.step,
                steps=self._steps,
                loss=metrics.loss,
                grad_norm=metrics.grad_norm,
                lr=metrics.lr,
                tokens_per_s=self._step_tokens / recent_s,
                left_s=(self._steps - metrics.step) * recent_s,
                memory_gib=memory_gib,
                eval_loss=eval_loss,
                mfu=mfu,
                offload=described(metrics.offload) if metrics.offload is not None else "",
            )
        )

    def finish(self, digest: str, total_s: float) -> None:
        """Show the summary of a run that has reached its last step.

        Args:
            digest: the digest of all parameters, in hexadecimal digits.
        """
        losses = self._losses or [float("nan")]
        median_s = statistics.median(self._step_times) if self._step_times else float("nan")
        summary = [
            ("steps", f"{self._steps} in {duration(total_s)}"),
            ("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}"),
            ("speed", f"{self._step_tokens / median_s:,.0f} tokens/s (median step)"),
            ("parameters", f"sha256 {digest[:16]}"),
            ("run", str(self._root)),
        ]
        if self._eval_loss is not None:
            summary.insert(2, ("held-out loss", f"{self._eval_loss:.4f}"))
        self._display.finish(summary)

    def close(self) -> None:
        self._display.close()
