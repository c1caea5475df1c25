"""The kinds of faults on purpose, as the configuration and `holdfast chaos` name them."""

from __future__ import annotations

from typing import Literal, get_args

FaultKind = Literal[
    "kill", "stop", "hold-lock", "slow", "exit", "corrupt-memory", "cut", "fill-disk"
]
"""kill: SIGKILL. stop: SIGSTOP. hold-lock: the interpreter's lock is held. slow: every later step
takes longer. exit: the process ends with code 1. corrupt-memory: a bit of optimizer state flips.
cut: the worker's node reaches no other node. fill-disk: the checkpoints' disk is full."""
FAULTS: tuple[FaultKind, ...] = get_args(FaultKind)
