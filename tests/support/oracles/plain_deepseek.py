"""The oracle for multi-token prediction: DeepSeek-V3 in plain PyTorch, sharing no code with the
project.

It is written from the papers (DeepSeek-AI 2024, DeepSeek-V2, section 2.1; DeepSeek-V3, sections 2.1
and 2.2), in the precision of its weights, and takes one document after another: nothing is masked
but what comes later. Where the papers leave it open, it does as transformers' `MtpModel`: the state
of the main model is the one that its head projects, and embeddings come before states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.trainer.models.deepseek_v3.family import DeepseekV3Config


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of neighbouring elements as pairs; x: float[seq, heads, dim].

    Its tables are float32, as is usual.
    """
    seq, _, dim = x.shape
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.arange(seq, dtype=torch.float32)[:, None] * frequencies
    turns = torch.complex(angles.cos().double(), angles.sin().double())[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class PlainDeepseek(nn.Module):
    """The model with its layer for the second token, by weights under published names."""

    def __init__(self, model: DeepseekV3Config, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        for name, value in weights.items():
            learns = not name.endswith("e_score_correction_bias")
            parameter = nn.Parameter(value.clone(), requires_grad=learns)
            self.register_parameter(name.replace(".", "/"), parameter)

    def weight(self, name: str) -> Tensor:
        return self.get_parameter(f"{name}.weight".replace(".", "/"))

    def gradients(self) -> dict[str, Tensor]:
        """By name; of experts without a token, zeros."""
        return {
            name.replace("/", "."): torch.zeros_like(own) if own.grad is None else own.grad
            for name, own in self.named_parameters()
            if own.requires_grad
        }

    def attention(self, prefix: str, x: Tensor) -> Tensor:
        m, seq = self.model, len(x)
        plain, turning = m.plain_head_dim, m.rope_head_dim
        latent = rms(x @ self.weight(f"{prefix}.q_a_proj").T, self.norm(prefix, "q_a"), 1e-6)
        query = (latent @ self.weight(f"{prefix}.q_b_proj").T).view(seq, m.heads, -1)
        down = x @ self.weight(f"{prefix}.kv_a_proj_with_mqa").T
        latent, shared = down.split([m.key_value_rank, turning], -1)
        latent = rms(latent, self.norm(prefix, "kv_a"), 1e-6)
        up = (latent @ self.weight(f"{prefix}.kv_b_proj").T).view(seq, m.heads, -1)
        key, value = up.split([plain, m.value_head_dim], -1)
        query, query_turned = query.split([plain, turning], -1)
        scores = torch.einsum("qhd,khd->hqk", query, key) + torch.einsum(
            "qhd,kd->hqk",
            turned(query_turned, m.rope_theta),
            turned(shared[:, None], m.rope_theta)[:, 0],
        )
        later = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        scores = (scores / (plain + turning) ** 0.5).masked_fill(later, -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
        return mixed.flatten(1) @ self.weight(f"{prefix}.o_proj").T

    def norm(self, prefix: str, which: str) -> Tensor:
        return self.weight(f"{prefix}.{which}_layernorm")

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up, down = (self.weight(f"{prefix}.{name}_proj") for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def experts(self, prefix: str, x: Tensor) -> Tensor:
        m = self.model
        scores = (x @ self.weight(f"{prefix}.gate").T).sigmoid()
        bias = self.get_parameter(f"{prefix}.gate.e_score_correction_bias".replace(".", "/"))
        biased = scores.detach() + bias
        if m.expert_groups > 1:
            groups = biased.view(len(x), m.expert_groups, -1)
            best = groups.topk(min(2, groups.shape[2])).values.sum(-1)
            allowed = best.topk(m.groups_per_token).indices
            is_out = torch.ones_like(best).scatter(1, allowed, 0.0) > 0
            biased = groups.masked_fill(is_out[..., None], -torch.inf).flatten(1)
        chosen = torch.zeros_like(scores).scatter(1, biased.topk(m.experts_per_token).indices, 1.0)
        shares = scores * chosen / (scores * chosen).sum(1, keepdim=True) * m.router_scale
        made = [self.mlp(f"{prefix}.experts.{expert}", x) for expert in range(m.experts)]
        found = (shares[..., None] * torch.stack(made, 1)).sum(1)
        return found + self.mlp(f"{prefix}.shared_experts", x)

    def layer(self, number: int, x: Tensor) -> Tensor:
        prefix, eps = f"model.layers.{number}", self.model.norm_eps
        normed = rms(x, self.norm(prefix, "input"), eps)
        x = x + self.attention(f"{prefix}.self_attn", normed)
        normed = rms(x, self.norm(prefix, "post_attention"), eps)
        dense = number in self.model.dense_layers
        return x + (self.mlp if dense else self.experts)(f"{prefix}.mlp", normed)

    def states(self, tokens: Tensor) -> Tensor:
        """What the head projects, of each place of a document: float[seq, hidden]."""
        x = self.weight("model.embed_tokens")[tokens]
        for number in range(self.model.layers):
            x = self.layer(number, x)
        return rms(x, self.weight("model.norm"), self.model.norm_eps)

    def further_states(self, states: Tensor, following: Tensor) -> Tensor:
        """The same for the second token, at the places whose next tokens are known."""
        prefix, eps = f"model.layers.{self.model.layers}", self.model.norm_eps
        embedded = self.weight("model.embed_tokens")[following]
        both = [
            rms(embedded, self.weight(f"{prefix}.enorm"), eps),
            rms(states[: len(following)], self.weight(f"{prefix}.hnorm"), eps),
        ]
        joined = torch.cat(both, -1) @ self.weight(f"{prefix}.eh_proj").T
        made = self.layer(self.model.layers, joined)
        return rms(made, self.weight(f"{prefix}.shared_head.norm"), eps)

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.weight("lm_head").T

    def losses(self, documents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The sums of the losses of next tokens, and of second ones.

        Args:
            documents: int64[tokens] each; every token but the first is predicted.
        """
        states = [self.states(document[:-1]) for document in documents]
        main = [
            F.cross_entropy(self.logits(own), document[1:], reduction="sum")
            for own, document in zip(states, documents, strict=True)
        ]
        return torch.stack(main).sum(), self.second_loss(states, documents)

    def second_loss(self, states: Sequence[Tensor], documents: Sequence[Tensor]) -> Tensor:
        """The sum of the losses of second tokens."""
        found = [
            F.cross_entropy(
                self.logits(self.further_states(own, document[1:-1])),
                document[2:],
                reduction="sum",
            )
            for own, document in zip(states, documents, strict=True)
            if len(document) > 2
        ]
        return torch.stack(found).sum()
