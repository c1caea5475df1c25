"""The phases of a training step, named in faults, traces and reports of slow ranks."""

from __future__ import annotations

from typing import Literal, get_args

StepPhase = Literal["compute", "backward", "fill", "reduce", "vote", "apply", "change"]
"""compute, reduce, vote and apply follow each other in every step. backward: half of the backward
passes of compute are done. fill: state is copied to a rank beside the step. change: the ranks
change."""
STEP_PHASES: tuple[StepPhase, ...] = get_args(StepPhase)
TIMED_PHASES: tuple[StepPhase, ...] = ("compute", "reduce", "vote", "apply")
"""The phases that every step has, in order."""
