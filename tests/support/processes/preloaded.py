"""What processes of runs import only when they need it: one process imports it for those that are
forked from it.
"""

from __future__ import annotations

TRAINING = (
    "holdfast.trainer.worker",
    "holdfast.trainer.models.decoder.layers",
    "holdfast.trainer.models.decoder.regions",
    "holdfast.parallel.optimizer.kernels.native_operations",
)
COMMANDS = (
    "holdfast.launch.commands.training",
    "holdfast.launch.launchers.elastic",
    "holdfast.trainer.elastic.loop",
    "holdfast.trainer.elastic.session",
    "holdfast.trainer.models.llama",
    "holdfast.parallel.plan.replan",
    "holdfast.parallel.plan.serialization",
    "pydantic.json_schema",  # for typer
    "pydantic.type_adapter",
)
