"""The heap that a run with offloaded activations wants for its processes; needs no torch."""

from __future__ import annotations

from holdfast.parallel.offload import restart_with_compact_heap
from holdfast.trainer.config import RunConfig


def wants_compact_heap(config: RunConfig) -> bool:
    """Whether activations leave host memory, so that freed memory must leave it too. Pure."""
    offload = config.offload
    on_host = config.train.device != "cuda"
    return offload.activations == "ssd" and offload.compact_heap and on_host


def prepare_heap(config: RunConfig) -> None:
    """Start the command again with a compact heap where its run wants one. Local; call it first."""
    if wants_compact_heap(config):
        restart_with_compact_heap()
