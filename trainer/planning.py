"""From a configuration to the plan of its run; needs no torch."""

from __future__ import annotations

from holdfast.parallel.mesh import Mesh
from holdfast.parallel.parameters import LayerSpec
from holdfast.parallel.plan import Plan, make_plan
from holdfast.trainer.config import RunConfig
from holdfast.trainer.model.specs import layer_specs


def layers_of_config(config: RunConfig) -> tuple[LayerSpec, ...]:
    """The model's layers as the plan sees them. Pure."""
    return layer_specs(
        config.model,
        tensor=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence_parallel and config.parallel.tensor > 1,
        seq_len=config.train.seq_len,
        micro_batch=config.train.micro_batch,
        precision=config.train.precision,
        recompute=config.train.recompute,
    )


def plan_of(config: RunConfig, generation: int = 0) -> Plan:
    """The plan of a run: equal on every rank, without communication.

    Raises:
        ConfigError: the layout does not fit the model or the batch.
    """
    parallel, train = config.parallel, config.train
    return make_plan(
        layers_of_config(config),
        Mesh(tensor=parallel.tensor, data=parallel.data, pipeline=parallel.pipeline),
        virtual=parallel.virtual,
        schedule=parallel.schedule,
        micro_batches=train.global_batch // train.micro_batch,
        block_elements=config.optimizer.block_elements,
        blocks_per_chunk=parallel.blocks_per_chunk or None,
        micro_batch_order=parallel.micro_batch_order,
        generation=generation,
    )
