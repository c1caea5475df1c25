"""The `[model]` keys of families with rotary embedding, and what sets their layers apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

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


class ExpertConfig(DecoderConfig, frozen=True, kw_only=True):
    """The keys of models whose MLPs are experts."""

    experts: int = 8
    experts_per_token: int = 2
    router_aux_loss_coef: float = 0.001
    """The factor of the auxiliary loss of each layer's router, per sequence."""
    router_z_loss_coef: float = 0.0
    """The factor of the square of the logarithm of each token's sum of exponentials."""


@dataclass(frozen=True, slots=True)
class RouterDesign:
    """The router of a layer's experts: how it chooses, and what keeps the choices even."""

    aux_loss: float
    """The factor of the auxiliary loss."""
    z_loss: float
    normalizes: bool = True
    """Whether the weights of a token's experts have the sum 1."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of its products."""
    scale: float = 1.0
    """The factor of the weights of a token's experts."""
    groups: int = 1
    """Experts lie in so many groups of equal size."""
    group_limit: int = 0
    """The groups that a token's experts may lie in; 0: all."""
    bias_speed: float | None = None
    """What an expert's bias, which counts for the choice only, changes by in a step; None: experts
    have none."""
    weight: str = "mlp.gate.weight"
    """The name of its weight in a layer."""
    bias: str = "mlp.gate.e_score_correction_bias"
    """The name of the biases in a layer."""


@dataclass(frozen=True, slots=True)
class ExpertDesign:
    """The experts of layers."""

    count: int
    per_token: int
    """The experts that a token goes to."""
    intermediate: int
    """The width of each."""
    router: RouterDesign
    shared: int = 0
    """The width of the MLP that all tokens go to beside their experts; 0: there is none."""
    dense_layers: tuple[int, ...] = ()
    """The layers that have a plain MLP in the place of experts."""
    only_first_dense: bool = False
    """Whether config.json can say so of the first layers only."""
    matrices: tuple[str, str, str] = (
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
        "mlp.experts.{}.down_proj.weight",
    )
    """The names of an expert's gate, up and down projections, with `{}` for its number."""


LATENT_NORM_EPS: Final = 1e-6
"""Added to the mean square in norms of latent vectors, whatever `norm_eps` is."""


@dataclass(frozen=True, slots=True)
class LatentDesign:
    """Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2): its widths.

    Keys and values of all heads are made of one latent vector of a token, and queries of another.
    A part of each head's query and key turns with the position; the key's is that of all heads.
    """

    query_rank: int
    """The width of the queries' latent vector; 0: they are made of the hidden state."""
    rank: int
    """The width of the latent vector of keys and values."""
    plain: int
    """The elements of a head's query and key that do not turn."""
    turning: int
    """Those that do."""
    value: int
    """The elements of a head's value, at most those of its key."""

    @property
    def key(self) -> int:
        """The elements of a head's query and key."""
        return self.plain + self.turning


@dataclass(frozen=True, slots=True)
class MultiTokenDesign:
    """Multi-token prediction (DeepSeek-AI 2024, DeepSeek-V3, section 2.2)."""

    layers: int
    """The layers behind the last one that predict a further token each; 1 can be computed."""
    loss: float
    """The factor of the loss of what they predict."""


@dataclass(frozen=True, slots=True)
class Design:
    """What the layers of a model have that a plain Llama's lack: a field for each such thing."""

    qkv_bias: bool = False
    """Biases of the projections to queries, keys and values."""
    output_bias: bool = False
    """The bias of attention's output projection."""
    mlp_bias: bool = False
    """Biases of the MLP's projections."""
    head_norms: bool = False
    """Norms of each head's queries and keys, before they are rotated."""
    latent: LatentDesign | None = None
    """Latent attention; None: queries, keys and values are made of the hidden state."""
    experts: ExpertDesign | None = None
    """The experts in the place of MLPs; None: there are none."""
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
    multi_token: MultiTokenDesign | None = None
    """The layer that predicts a further token; None: there is none."""

    def shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The shape of a layer's matrix. Pure."""
        return (inputs, outputs) if self.inputs_first else (outputs, inputs)

    def as_stored(self, rows: Iterable[ParameterSpec]) -> tuple[ParameterSpec, ...]:
        """The rows under the names that checkpoints of the family have. Pure."""
        return tuple(rows if self.stored is None else map(self.stored, rows))

    def window(self, layer: int) -> int:
        """The keys that a query of a layer sees; 0: all before it."""
        return self.windows[layer] if self.windows else 0

    def experts_of(self, layer: int) -> ExpertDesign | None:
        """The experts of a layer; None: it has a plain MLP."""
        experts = self.experts
        return None if experts is not None and layer in experts.dense_layers else experts


def is_windowed(window: int, seq_len: int) -> bool:
    """Whether a window hides keys in sequences of this length."""
    return 0 < window < seq_len
