"""The phases of a training step, and the kinds of faults that are caused on purpose in them.

Faults, traces and reports of slow ranks name phases; the configuration and `holdfast chaos` name
faults.
"""

from __future__ import annotations

from typing import Literal, get_args

StepPhase = Literal[
    "compute",
    "prefetch",
    "micro-batch",
    "backward",
    "exchange",
    "fill",
    "reduce",
    "vote",
    "apply",
    "gather",
    "change",
]
"""compute, reduce, vote and apply follow each other in every step. prefetch: parameters of later
layers are on their way, with parallel.shard = "parameters". micro-batch: a micro-batch's backward
pass begins. backward: half of the backward passes of compute are done. exchange: the first gradient
sums are on their way to their owners. fill: state is copied to a rank beside the step. gather: the
first updated parameters are on their way to their holders. change: the ranks change."""
STEP_PHASES: tuple[StepPhase, ...] = get_args(StepPhase)
TIMED_PHASES: tuple[StepPhase, ...] = ("compute", "reduce", "vote", "apply")
"""The phases that every step has, in order."""

FaultKind = Literal[
    "kill",
    "stop",
    "hold-lock",
    "deadlock",
    "stuck-disk",
    "slow",
    "slow-compute",
    "throttle",
    "exit",
    "corrupt-memory",
    "corrupt-compute",
    "cut",
    "fill-disk",
]
"""kill: SIGKILL. stop: SIGSTOP. hold-lock: the interpreter's lock is held. deadlock: a message is
awaited that never comes. stuck-disk: a write does not end. slow: every later step takes longer.
slow-compute: for a time, micro-batches take longer. throttle: for a time, the process is stopped
again and again. exit: the process ends with code 1. corrupt-memory: a bit of optimizer state flips.
corrupt-compute: for a time, bits flip in the results of matrix products. cut: the worker's node
reaches no other node. fill-disk: the checkpoints' disk is full."""
FAULTS: tuple[FaultKind, ...] = get_args(FaultKind)
