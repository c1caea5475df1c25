"""The Llama family as one value. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from holdfast.parallel.layout import LayerSpec
from holdfast.trainer.models.family import ChunkContext, Family, RegionSizes
from holdfast.trainer.models.llama.huggingface import config_json, differences
from holdfast.trainer.models.llama.rules import problems
from holdfast.trainer.models.llama.sizes import tensor_share, tiny
from holdfast.trainer.models.llama.table import layer_specs
from holdfast.trainer.models.section import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from holdfast.trainer.models.compilation import Region


def modules(model: ModelConfig, context: ChunkContext) -> Callable[[int, LayerSpec], nn.Module]:
    """The builder of a chunk's modules. Imports torch."""
    from holdfast.trainer.models.llama.modules import module_builder

    return module_builder(model, context)


def compiled_regions(model: ModelConfig, sizes: RegionSizes) -> Iterator[Region]:
    """The functions that `train.compile` compiles. Imports torch."""
    from holdfast.trainer.models.llama.regions import regions

    return regions(model, sizes)


FAMILY = Family(
    section=ModelConfig,
    problems=problems,
    layer_specs=layer_specs,
    modules=modules,
    config_json=config_json,
    differences=differences,
    tiny=tiny,
    tensor_share=tensor_share,
    compiled_regions=compiled_regions,
)
