"""Rotary embedding (Su et al. 2021, in Hugging Face's half-rotation form), and its scalings.

Scaled frequencies are those of Dubey et al. 2024 ("llama3") and of Peng et al. 2023 ("yarn"), with
the settings and defaults of transformers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.trainer.models.decoder.section import DecoderConfig, Design, RopeScaling


class RotaryTables(NamedTuple):
    """The rotary embedding's cos and sin: float[seq, head_dim / 2].

    They are computed in float32, and have the type of the model. Where only some elements of a head
    turn, these are the first of each half. None: nothing is rotated.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None

    @classmethod
    def of(
        cls,
        model: DecoderConfig,
        seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        turning: int = 0,
    ) -> RotaryTables:
        """The tables of positions 0 to seq_len - 1.

        Args:
            turning: the elements of a head that turn; 0: all.
        """
        turning = turning or model.dim_per_head
        frequencies, factor = scaled_frequencies(
            turning, model.rope_theta, model.rope_scaling, device
        )
        positions = torch.arange(seq_len, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        rest = (0, (model.dim_per_head - turning) // 2)
        cos, sin = F.pad(cos, rest, value=1.0), F.pad(sin, rest)
        return cls(cos.to(dtype), sin.to(dtype))

    def within(self, places: slice) -> RotaryTables:
        """The tables of these positions."""
        if self.cos is None or self.sin is None:
            return self
        return RotaryTables(self.cos[places], self.sin[places])

    def at(self, positions: Tensor) -> RotaryTables:
        """The tables of these positions, int64[seq, batch]: float[batch, 1, seq, head_dim / 2]."""
        if self.cos is None or self.sin is None:
            return self
        cos, sin = (table[positions.t()].unsqueeze(1) for table in (self.cos, self.sin))
        return RotaryTables(cos, sin)


def tables_of(
    model: DecoderConfig, design: Design, seq_len: int, dtype: torch.dtype, device: torch.device
) -> RotaryTables:
    """The tables of a model, without any where it learns its positions."""
    if design.learned_positions:
        return RotaryTables()
    turning = 0 if design.latent is None else design.latent.turning
    return RotaryTables.of(model, seq_len, dtype, device, turning)


def scaled_frequencies(
    dim: int, theta: float, scaling: RopeScaling, device: torch.device
) -> tuple[Tensor, float]:
    """The angles per position, float32[dim / 2], and the factor of cos and sin."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / theta**exponents
    match scaling.rope_type:
        case "default":
            return frequencies, 1.0
        case "linear":
            return frequencies / scaling.factor, 1.0
        case "proportional":
            turning = int(scaling.partial_rotary_factor * dim // 2)
            frequencies[turning:] = 0.0
            return frequencies / scaling.factor, 1.0
        case "llama3":
            return _llama3(frequencies, scaling), 1.0
        case "yarn":
            slowed = 1.0 / (scaling.factor * theta**exponents)
            kept = 1.0 - _yarn_ramp(dim, theta, scaling, device)
            return slowed * (1.0 - kept) + frequencies * kept, attention_factor(scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched by the factor, short ones stay, those between are mixed."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    known = scaling.original_max_position_embeddings
    lengths = 2 * math.pi / frequencies
    stretched = torch.where(lengths > known / low, frequencies / scaling.factor, frequencies)
    share = (known / lengths - low) / (high - low)
    mixed = (1 - share) * stretched / scaling.factor + share * stretched
    is_between = (lengths >= known / high) & (lengths <= known / low)
    return torch.where(is_between, mixed, stretched)


def _yarn_ramp(dim: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """The share of each frequency that is stretched: float32[dim / 2], from 0 up to 1."""

    def place(turns: float) -> float:
        """The element whose wave turns that often in the original length."""
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(theta))

    first, last = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    places = torch.arange(dim // 2, dtype=torch.float32, device=device)
    return ((places - first) / (last - first)).clamp(0, 1)


def attention_factor(scaling: RopeScaling) -> float:
    """The factor of cos and sin with "yarn"."""
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.factor, scaling.mscale) / magnitude(
            scaling.factor, scaling.mscale_all_dim
        )
    return magnitude(scaling.factor)


def magnitude(factor: float, scale: float = 1.0) -> float:
    """0.1 scale log(factor) + 1: how much larger scores are for sequences `factor` as long."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rotated(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`value` rotated: float[batch, heads, seq, head_dim], by tables of [seq, head_dim / 2]."""
    first, second = value.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
