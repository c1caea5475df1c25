"""The `[model]` keys of families with rotary embedding, and what sets their layers apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

from holdfast.parallel.layout import ParameterSpec
from holdfast.trainer.models.section import ModelConfig


class RopeScaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The scaling of rotary embedding for longer sequences, by the names of config.json.

    A field for each setting of transformers' `rope_parameters`, without the base.
    """

    rope_type: Literal["default", "linear", "proportional", "llama3", "yarn"] = "default"
    factor: float = 1.0
    """How much longer sequences are than the original ones."""
    original_max_position_embeddings: int = 0
    """The length of sequences before the scaling; needed by "llama3" and "yarn"."""
    partial_rotary_factor: float = 1.0
    """With "proportional": the share of the frequencies, fastest first, that turn at all."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    """The factor of cos and sin with "yarn"; 0: it follows from `factor`."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


class DecoderConfig(ModelConfig, frozen=True, kw_only=True):
    """The keys of models with rotary embedding."""

    rope_scaling: RopeScaling = RopeScaling()


class LearnedPositionsConfig(DecoderConfig, frozen=True, kw_only=True):
    """The keys of models that learn positions; each head has keys and values of its own."""


class WindowedConfig(DecoderConfig, frozen=True, kw_only=True):
    """The keys of models whose queries may see the nearest keys only."""

    sliding_window: int = 0
    """The keys that a query sees, itself included; 0: all before it."""


class LayeredWindowConfig(WindowedConfig, frozen=True, kw_only=True):
    """The keys of models of which only the upper layers have a window."""

    max_window_layers: int = 0
    """The layers at the bottom that see all keys whatever `sliding_window` says."""

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer; see `Design.windows`."""
        below = min(self.max_window_layers, self.layers)
        return (0,) * below + (self.sliding_window,) * (self.layers - below)


class ExpertConfig(WindowedConfig, frozen=True, kw_only=True):
    """The keys of models whose MLPs are experts."""

    experts: int = 8
    experts_per_token: int = 2
    router_aux_loss_coef: float = 0.001
    """The factor of the auxiliary loss of each layer's router, per sequence."""
    router_z_loss_coef: float = 0.0
    """The factor of the square of the logarithm of each token's sum of exponentials."""


@dataclass(frozen=True, slots=True)
class ExpertDesign:
    """The experts of a layer."""

    count: int
    per_token: int
    """The experts that a token goes to."""
    intermediate: int
    """The width of each."""
    normalizes: bool
    """Whether the weights of a token's experts have the sum 1."""
    aux_loss: float
    """The factor of the auxiliary loss."""
    z_loss: float
    router: str
    """The name of the router's weight in a layer."""
    matrices: tuple[str, str, str]
    """The names of an expert's gate, up and down projections, with `{}` for its number."""


@dataclass(frozen=True, slots=True)
class Design:
    """What the layers of a model have that a plain Llama's lack."""

    qkv_bias: bool = False
    """Biases of the projections to queries, keys and values."""
    output_bias: bool = False
    """The bias of attention's output projection."""
    mlp_bias: bool = False
    """Biases of the MLP's projections."""
    head_norms: bool = False
    """Norms of each head's queries and keys, before they are rotated."""
    experts: ExpertDesign | None = None
    """The experts in the place of each MLP; None: there are none."""
    layer_norm: bool = False
    """LayerNorm (Ba et al. 2016), which has a bias, in the place of RMSNorm."""
    learned_positions: bool = False
    """A weight for each position, added to the embedding, and no rotary embedding."""
    gelu: Literal["", "none", "tanh"] = ""
    """GELU between two projections in the place of SwiGLU, by how torch approximates it. Empty:
    SwiGLU."""
    inputs_first: bool = False
    """Matrices of layers as float[in, out]; queries, keys and values are matrices of their own."""
    stored: Callable[[ParameterSpec], ParameterSpec] | None = None
    """A row under Llama's name -> the row under the family's own, where checkpoints have that."""
    windows: tuple[int, ...] = ()
    """By layer, the keys that a query sees, itself included; 0: all before it. Empty: 0."""

    def shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The shape of a layer's matrix. Pure."""
        return (inputs, outputs) if self.inputs_first else (outputs, inputs)

    def as_stored(self, rows: Iterable[ParameterSpec]) -> tuple[ParameterSpec, ...]:
        """The rows under the names that checkpoints of the family have. Pure."""
        return tuple(rows if self.stored is None else map(self.stored, rows))

    def window(self, layer: int) -> int:
        """The keys that a query of a layer sees; 0: all before it."""
        return self.windows[layer] if self.windows else 0


def is_windowed(window: int, seq_len: int) -> bool:
    """Whether a window hides keys in sequences of this length."""
    return 0 < window < seq_len
