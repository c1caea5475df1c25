"""The oracle for training: a plain single-process Llama and loop, sharing no code with the project.

Parameters carry the Hugging Face names, so any state with those names can be loaded into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    layers: int = 6
    hidden: int = 96
    intermediate: int = 224
    heads: int = 6
    kv_heads: int = 3
    vocab: int = 320
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False


@dataclass(frozen=True)
class Packed:
    """The documents of a batch: a place attends to places before it with the same number."""

    number: Tensor
    """int64[batch, seq]: each place's document."""
    positions: Tensor
    """int64[batch, seq]: each place's position in it."""

    @property
    def mask(self) -> Tensor:
        """bool[batch, 1, query, key]"""
        seq = self.number.shape[1]
        same = self.number[:, :, None] == self.number[:, None, :]
        return (same & torch.ones(seq, seq, dtype=torch.bool).tril())[:, None]


def rotate(x: Tensor, theta: float, positions: Tensor | None = None) -> Tensor:
    """Rotary embedding with half rotation; x: float[batch, heads, seq, head_dim]."""
    seq, dim = x.shape[-2:]
    device = x.device
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if positions is None:
        positions = torch.arange(seq, device=device)[None]
    angle = positions.float()[:, None, :, None] * frequency
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape, dim = s, s.hidden // s.heads
        self.q_proj = nn.Linear(s.hidden, s.heads * dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(s.heads * dim, s.hidden, bias=False)

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        s, (batch, seq, _) = self.shape, x.shape
        q, k, v = (
            p(x).view(batch, seq, heads, -1).transpose(1, 2)
            for p, heads in (
                (self.q_proj, s.heads),
                (self.k_proj, s.kv_heads),
                (self.v_proj, s.kv_heads),
            )
        )
        positions = None if packed is None else packed.positions
        q, k = rotate(q, s.rope_theta, positions), rotate(k, s.rope_theta, positions)
        mask = None if packed is None else packed.mask
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq, -1))


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.down_proj = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden, s.norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.norm_eps)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), packed)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainLlama(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.model: Any = nn.Module()
        self.model.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.model.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.model.norm = RMSNorm(s.hidden, s.norm_eps)
        self.lm_head = nn.Linear(s.hidden, s.vocab, bias=False)
        if s.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight  # pyrefly: ignore

    def forward(self, tokens: Tensor, packed: Packed | None = None) -> Tensor:
        """tokens: int64[batch, seq] -> logits: float[batch, seq, vocab]."""
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, packed)
        return self.lm_head(self.model.norm(x))

    def load_named(self, values: Mapping[str, Tensor]) -> None:
        """Take the values of every parameter by its Hugging Face name."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(values[name])


@dataclass(frozen=True)
class StepRecord:
    loss: float
    grad_norm: float


def train_plainly(
    model: nn.Module,
    batches: Callable[[int], Tensor],
    learning_rate: Callable[[int], float],
    *,
    steps: int,
    micro_batch: int,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    fused: bool = False,
    skips: Callable[[list[StepRecord]], bool] = lambda records: False,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    further: Callable[[Tensor], Tensor] | None = None,
) -> list[StepRecord]:
    """The usual training loop: autograd, clip_grad_norm_, torch.optim.AdamW.

    Args:
        model: int64[rows, seq] -> the logits.
        optimizers: in AdamW's place, with what multiplies the learning rate as a group's "factor".
        batches: step -> int64[global_batch, seq + 1].
        skips: whether the last of the steps so far is left out.
        further: int64[rows, seq + 1] -> what is learned beside the sum of the losses.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if optimizers is None:
        optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused)]
    records = []
    for step in range(steps):
        tokens = batches(step)
        count = tokens.shape[0] * (tokens.shape[1] - 1)
        total = 0.0
        model.zero_grad()
        for part in tokens.split(micro_batch):
            logits = model(part[:, :-1])
            loss = F.cross_entropy(
                logits.flatten(0, 1).float()
                if logits.dtype != torch.float64
                else logits.flatten(0, 1),
                part[:, 1:].flatten(),
                reduction="sum",
            )
            total += loss.item()
            if further is not None:
                loss = loss + further(part)
            (loss / count).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm if clip_norm else math.inf)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = learning_rate(step) * group.get("factor", 1.0)
        records.append(StepRecord(total / count, float(norm)))
        if not skips(records):
            for optimizer in optimizers:
                optimizer.step()
    return records
