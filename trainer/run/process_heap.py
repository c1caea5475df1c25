"""The heap that a run with offloaded activations wants for its processes; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.parallel.offload import restart_with_compact_heap
from holdfast.trainer.config import RunConfig, load_config


def wants_compact_heap(config: RunConfig) -> bool:
    """Whether activations leave host memory, so that it matters how much of it stays resident. Pure."""
    offload = config.offload
    on_host = config.train.device != "cuda"
    return offload.activations == "ssd" and offload.compact_heap and on_host


def prepare_heap(config_path: Path, overrides: Sequence[str]) -> None:
    """Before a command does anything: start it again with a compact heap where its run wants one. Local.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    if wants_compact_heap(load_config(config_path, overrides)):
        restart_with_compact_heap()
