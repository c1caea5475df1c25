"""Families of decoders: what each adds is its section, its design and its `config.json`.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from holdfast.parallel.layout import LayerSpec
from holdfast.trainer.models.decoder.huggingface import Described
from holdfast.trainer.models.decoder.rules import problems
from holdfast.trainer.models.decoder.section import DecoderConfig, Design
from holdfast.trainer.models.decoder.sizes import tensor_share, tiny
from holdfast.trainer.models.decoder.table import layer_specs
from holdfast.trainer.models.family import ChunkContext, Family, RegionSizes, TrainingOnly

if TYPE_CHECKING:
    from torch import nn

    from holdfast.trainer.models.compilation import Region

D = TypeVar("D", bound=DecoderConfig)


def decoder_family(
    section: type[D], design: Callable[[D], Design], described: Described
) -> Family[D]:
    """A family of decoders.

    Args:
        design: of a section, what its layers add to a plain Llama's.
    """

    def broken(model: D, parts: int, key: str) -> Iterator[str]:
        return problems(model, design(model), parts, key)

    def specs(model: D, **layout: Any) -> tuple[LayerSpec, ...]:
        return layer_specs(model, design(model), **layout)

    def modules(model: D, context: ChunkContext) -> Callable[[int, LayerSpec], nn.Module]:
        from holdfast.trainer.models.decoder.layers import module_builder

        return module_builder(model, design(model), context)

    def compiled_regions(model: D, sizes: RegionSizes) -> Iterator[Region]:
        from holdfast.trainer.models.decoder.regions import regions

        return regions(model, design(model), sizes)

    def count_of(made: Design) -> int:
        return 0 if made.experts is None else made.experts.count

    may_predict_more = "multi_token_layers" in section.__struct_fields__
    return Family(
        section=section,
        problems=broken,
        layer_specs=specs,
        modules=modules,
        config_json=described.config_json,
        section_of=described.section,
        differences=described.differences,
        tiny=tiny,
        tensor_share=tensor_share,
        compiled_regions=compiled_regions,
        experts=lambda model: count_of(design(model)),
        windows=lambda model: design(model).windows,
        clips_heads=lambda model: not design(model).head_norms,
        training_only=_multi_token(design) if may_predict_more else None,
    )


def _multi_token(design: Callable[[D], Design]) -> TrainingOnly[D]:
    """The layer that predicts a further token, behind the last one."""

    def without(model: D) -> D:
        if design(model).multi_token is None:
            return model
        return msgspec.structs.replace(model, multi_token_layers=0)

    return TrainingOnly(
        count_losses=lambda model: int(design(model).multi_token is not None),
        without=without,
        has_weight=lambda model, name: name.startswith(f"model.layers.{model.layers}."),
    )
