"""The heap settings of a run with offloaded activations. Needs no torch."""

from __future__ import annotations

from holdfast.parallel.offload import restart_with_compact_heap
from holdfast.trainer.config import RunConfig


def wants_compact_heap(config: RunConfig) -> bool:
    """Whether activations leave host memory, so that freed memory must be returned. Pure."""
    offload = config.offload
    on_host = config.train.device != "cuda"
    return offload.activations == "ssd" and offload.compact_heap and on_host


def prepare_heap(config: RunConfig) -> None:
    """Restart the command with a compact heap if its run needs one. Local; call it first."""
    if wants_compact_heap(config):
        restart_with_compact_heap()
