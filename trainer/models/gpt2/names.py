"""The parameters of GPT-2 as transformers' checkpoints have them. Pure.

Matrices of layers are float[in, out], and those of queries, keys and values lie side by side in
one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from holdfast.parallel.layout import Box, ParameterSpec

_ENDS: Final[Mapping[str, str]] = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.embed_positions.weight": "transformer.wpe.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_MODULES: Final[Mapping[str, str]] = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_SIDE_BY_SIDE: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""What `attn.c_attn` is made of."""


def as_stored(row: ParameterSpec) -> ParameterSpec:
    """A row of a decoder's table, under Llama's name, as the part of GPT-2's tensor that it is."""
    found = _LAYER.fullmatch(row.name)
    if found is None:
        return replace(row, name=_ENDS[row.name])
    layer, module, kind = found.groups()
    prefix = f"transformer.h.{layer}"
    shape, start, stop = row.shape[::-1], row.box.start[::-1], row.box.stop[::-1]
    if module not in _SIDE_BY_SIDE:
        name = f"{prefix}.{_MODULES[module]}.{kind}"
        return replace(row, name=name, shape=shape, box=Box(start, stop))
    *inputs, outputs = shape
    before = _SIDE_BY_SIDE.index(module) * outputs
    heads = row.heads and replace(row.heads, first=before, dim=len(inputs))
    return replace(
        row,
        heads=heads,
        name=f"{prefix}.attn.c_attn.{kind}",
        shape=(*inputs, len(_SIDE_BY_SIDE) * outputs),
        box=Box((*start[:-1], before + start[-1]), (*stop[:-1], before + stop[-1])),
    )
