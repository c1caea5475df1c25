"""The offloader of a run, by its configuration."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import assert_never

import torch

from holdfast.parallel.offload import Bounds, Offloader
from holdfast.trainer.config import RunConfig

logger = logging.getLogger("holdfast.offload")


def open_offloader(
    config: RunConfig, device: torch.device, waiting: Callable[[], AbstractContextManager[object]]
) -> Offloader | None:
    """The offloader of this rank's activations; None if they stay in memory. Local.

    Args:
        waiting: a context for work that lasts as long as the drive takes.
    Raises:
        ConfigError: offload.path does not allow a file to be made.
    """
    offload = config.offload
    match offload.activations:
        case "none":
            return None
        case "ssd":
            path = offload.path or tempfile.gettempdir()
        case "host":
            path = None
            if device.type == "cpu":
                logger.warning("offload.activations = 'host' saves nothing on a CPU")
        case unknown:
            assert_never(unknown)
    return Offloader(
        path,
        limit_bytes=int(offload.limit_gib * 2**30),
        smallest_bytes=offload.smallest_kib << 10,
        bounds=Bounds(offload.least_share, offload.most_share),
        bytes_per_s=offload.limit_mib_per_s * 2**20,
        staging_bytes=offload.staging_mib << 20,
        waiting=waiting,
    )
