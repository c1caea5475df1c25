"""Runs in the least layout, to which those in others are compared."""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.trainer.config import RunConfig
from support.processes.cluster import Cluster, WorkerFailed
from support.runs.layout_factors import undisturbed
from support.runs.small_runs import run_training


class Undisturbed:
    """What undisturbed runs give: each is trained once, when it is first asked for."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._found: dict[bytes, dict[str, Any]] = {}

    def has_bits_of(self, config: RunConfig) -> bool:
        """Whether a run has the losses, norms and parameters of its undisturbed one.

        Raises:
            WorkerFailed: the run ends with an error. A note says which it is.
        """
        least = undisturbed(config)
        key = msgspec.json.encode(least)
        if key not in self._found:
            self._found[key] = self._train(least)
        return self._train(config) == self._found[key]

    def _train(self, config: RunConfig) -> dict[str, Any]:
        try:
            return run_training(self._cluster, config, timeout_s=250.0)
        except WorkerFailed as error:
            error.add_note(str(msgspec.to_builtins(config)))
            raise
