"""The extent of a run that one process can plan, in what grows with a configuration's numbers.

Every rank makes the whole plan, at the start and again after a loss. These limits keep it within
seconds and a few hundred megabytes; each is several times what the largest published runs need.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING

import msgspec

from holdfast.parallel.layout import LayerSpec
from holdfast.trainer.models import layer_specs

if TYPE_CHECKING:
    from holdfast.trainer.config.sections import RunConfig

MOST_RANKS = 2**20
MOST_MICRO_BATCHES = 2**20
"""Of a step, over all replicas."""
MOST_CHUNK_PASSES = 2**17
"""Forward passes of a step of one replica: micro-batches times model chunks times stretches."""
MOST_COPIES = 2**22
"""Layers times the square of the tensor degree, for the table of the copies of norm weights."""
MOST_BLOCKS = 2**18
"""Optimizer blocks of the whole model."""


def extent_problems(config: RunConfig) -> Iterator[str]:
    """One line per limit that a configuration exceeds, with the way out. Pure.

    The sizes are within their ranges, and the layout fits the model.
    """
    parallel, train, model = config.parallel, config.train, config.model
    if parallel.ranks > MOST_RANKS:
        yield f"the layout {parallel.mesh.text} has {parallel.ranks} ranks: at most {MOST_RANKS}"
    micro_batches = train.global_batch // train.micro_batch
    if micro_batches > MOST_MICRO_BATCHES:
        yield (
            f"a step has {micro_batches} micro-batches: at most {MOST_MICRO_BATCHES}; raise "
            "train.micro_batch or lower train.global_batch"
        )
    passes = ceil(micro_batches / parallel.data) * parallel.pipeline * parallel.virtual
    passes *= parallel.stretches
    if passes > MOST_CHUNK_PASSES:
        yield (
            f"a replica's step has {passes} forward passes of model chunks: at most "
            f"{MOST_CHUNK_PASSES}; raise train.micro_batch or parallel.data, or lower "
            "train.global_batch or parallel.stretches"
        )
    if model.layers * config.tensor_parts**2 > MOST_COPIES:
        key = config.tensor_parts_key
        what = "tensor degree" if key == "parallel.tensor" else "number of shards"
        yield (
            f"model.layers = {model.layers} with {key} = {config.tensor_parts}: layers times the "
            f"square of the {what} must be at most {MOST_COPIES}; lower one of them"
        )
    elif (blocks := block_count(config)) > MOST_BLOCKS:
        larger = config.optimizer.block_elements * ceil(blocks / MOST_BLOCKS)
        yield (
            f"the optimizer has {blocks} blocks of optimizer.block_elements = "
            f"{config.optimizer.block_elements}: at most {MOST_BLOCKS}; set it to {larger} or more"
        )


def block_count(config: RunConfig) -> int:
    """The optimizer blocks of all parts, from one transformer layer. Pure.

    Every transformer layer of a family has a table of the same shapes.
    """
    embedding, layer, head = layer_specs(
        msgspec.structs.replace(config.model, layers=1),
        tensor=config.parallel.tensor,
        sequence_parallel=False,
        seq_len=config.train.seq_len,
        micro_batch=config.train.micro_batch,
        precision=config.train.precision,
        recompute="none",
        shards=config.numerics.tensor_shards,
    )
    elements = config.optimizer.block_elements
    return config.model.layers * _blocks(layer, elements) + sum(
        _blocks(edge, elements) for edge in (embedding, head)
    )


def parameter_names(config: RunConfig) -> list[str]:
    """The logical names of the model's parameters, in the order of its layers. Pure."""
    layers = layer_specs(
        config.model,
        tensor=1,
        sequence_parallel=False,
        seq_len=config.train.seq_len,
        micro_batch=config.train.micro_batch,
        precision=config.train.precision,
        recompute="none",
    )
    return list(dict.fromkeys(spec.name for layer in layers for spec in layer.parameters[0]))


def _blocks(layer: LayerSpec, block_elements: int) -> int:
    return sum(
        ceil(spec.rows / max(1, block_elements // spec.row_elements))
        for part, specs in enumerate(layer.parameters)
        for spec in specs
        if spec.is_first(part)
    )
