"""The Llama family's parameter table and costs; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from holdfast.parallel.layout import Box, Initial, LayerSpec, ParameterSpec, even_range
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.models.section import ModelConfig


def layer_specs(
    model: ModelConfig,
    *,
    tensor: int,
    sequence_parallel: bool,
    seq_len: int,
    micro_batch: int,
    precision: str,
    recompute: str | Sequence[str],
    vocab_chunk: int = 0,
    shards: int = 1,
) -> tuple[LayerSpec, ...]:
    """Every layer from embedding to head: parameters by part, and costs on a rank. Pure.

    Args:
        sequence_parallel: whether hidden states are split over the tensor group.
        precision: a name of `PRECISIONS`.
        recompute: "none", "full" or "selective", of all transformer layers or of each.
        vocab_chunk: the vocabulary entries of a part whose logits are in memory at once; 0: all.
        shards: the parts of each layer; 1: one for each rank.
    """
    parts = max(shards, tensor)
    if vocab_chunk >= -(-model.vocab // parts):
        vocab_chunk = 0
    of_layers = [recompute] * model.layers if isinstance(recompute, str) else recompute
    sums_parts = sequence_parallel or shards > 1
    tables = [_Table(model, parts, index, sums_parts, shards > 1) for index in range(parts)]
    costs = _Costs(model, tensor, sequence_parallel, seq_len, micro_batch, precision)
    transformer = [
        LayerSpec(
            name=f"block.{i}",
            parameters=tuple(table.transformer(i) for table in tables),
            forward_flops=costs.layer_flops,
            activation_bytes=costs.layer_activation_bytes[how],
            output_bytes=costs.hidden_bytes,
            recompute=how,
            recompute_flops=costs.layer_recompute_flops[how],
            attention_flops=costs.core_flops,
            keys_bytes=costs.keys_bytes,
        )
        for i, how in enumerate(of_layers)
    ]
    embedding = LayerSpec(
        name="embedding",
        parameters=tuple(table.embedding() for table in tables),
        forward_flops=0.0,
        activation_bytes=costs.embedding_activation_bytes,
        output_bytes=costs.hidden_bytes,
        forward_only=True,
    )
    head = LayerSpec(
        name="head",
        parameters=tuple(table.head() for table in tables),
        forward_flops=costs.head_flops,
        activation_bytes=costs.head_activation_bytes(vocab_chunk),
        output_bytes=8,
        recompute="logits" if vocab_chunk else "none",
        recompute_flops=costs.head_flops if vocab_chunk else 0.0,
        vocab_chunk=vocab_chunk,
    )
    return (embedding, *transformer, head)


def shares_heads(model: ModelConfig, parts: int, is_sharded: bool) -> bool:
    """Whether several parts of a rank may have a key and value head in common.

    Queries, keys and values are matrices of their own then, so that a rank has each once.
    """
    return is_sharded and model.kv_heads % parts != 0


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of one part."""

    model: ModelConfig
    parts: int
    index: int
    norms_differ: bool
    """Whether the norms of each part see other tokens."""
    is_sharded: bool
    """Whether one rank may have several parts."""

    def embedding(self) -> tuple[ParameterSpec, ...]:
        return (self._vocabulary("model.embed_tokens.weight", "weight", 0),)

    def head(self) -> tuple[ParameterSpec, ...]:
        norm = self._norm("model.norm.weight", "norm.weight")
        if self.model.tie_embeddings:
            return norm, self._vocabulary("model.embed_tokens.weight", "projection", 1)
        return norm, self._vocabulary("lm_head.weight", "projection", 0)

    def transformer(self, layer: int) -> tuple[ParameterSpec, ...]:
        model = self.model
        prefix, dim = f"model.layers.{layer}", model.dim_per_head
        queries = (model.heads * dim, model.hidden)
        keys = (model.kv_heads * dim, model.hidden)
        q, k, v = self._projections(f"{prefix}.self_attn", queries, keys)
        wide = (model.intermediate, model.hidden)
        gate = self._rows(f"{prefix}.mlp.gate_proj.weight", wide, "mlp.gate_up", 0)
        up = self._rows(f"{prefix}.mlp.up_proj.weight", wide, "mlp.gate_up", gate.rows)
        return (
            self._norm(f"{prefix}.input_layernorm.weight", "attention_norm.weight"),
            q,
            k,
            v,
            self._columns(f"{prefix}.self_attn.o_proj.weight", queries[::-1], "attention.output"),
            self._norm(f"{prefix}.post_attention_layernorm.weight", "mlp_norm.weight"),
            gate,
            up,
            self._columns(f"{prefix}.mlp.down_proj.weight", wide[::-1], "mlp.down"),
        )

    def _projections(
        self, prefix: str, queries: tuple[int, int], keys: tuple[int, int]
    ) -> tuple[ParameterSpec, ParameterSpec, ParameterSpec]:
        names = [f"{prefix}.{which}_proj.weight" for which in ("q", "k", "v")]
        if shares_heads(self.model, self.parts, self.is_sharded):
            return (
                self._rows(names[0], queries, "attention.query", 0),
                self._kv(names[1], keys, "attention.key", 0),
                self._kv(names[2], keys, "attention.value", 0),
            )
        start, stop = self._kv_rows()
        share = queries[0] // self.parts
        return (
            self._rows(names[0], queries, "attention.qkv", 0),
            self._kv(names[1], keys, "attention.qkv", share),
            self._kv(names[2], keys, "attention.qkv", share + stop - start),
        )

    def _normal(self) -> Initial:
        return Initial("normal", self.model.init_std)

    def _norm(self, name: str, local: str) -> ParameterSpec:
        shape, copies = (self.model.hidden,), tuple(range(self.parts))
        return ParameterSpec(
            name=name,
            shape=shape,
            box=Box((0,), shape),
            local=local,
            local_row=0,
            initial=Initial("constant", 1.0),
            decay=False,
            copies=copies,
            summed=copies if self.norms_differ and self.parts > 1 else (),
        )

    def _split(self, size: int) -> tuple[int, int]:
        return even_range(size, self.parts, self.index)

    def _vocabulary(self, name: str, local: str, tied_use: int) -> ParameterSpec:
        shape = (self.model.vocab, self.model.hidden)
        start, stop = self._split(self.model.vocab)
        return self._sharded(name, shape, Box((start, 0), (stop, shape[1])), local, 0, tied_use)

    def _rows(self, name: str, shape: tuple[int, int], local: str, local_row: int) -> ParameterSpec:
        start, stop = self._split(shape[0])
        return self._sharded(name, shape, Box((start, 0), (stop, shape[1])), local, local_row)

    def _columns(self, name: str, shape: tuple[int, ...], local: str) -> ParameterSpec:
        rows, columns = shape
        start, stop = self._split(columns)
        output = Initial("normal", self.model.init_std / sqrt(2 * self.model.layers))
        box = Box((0, start), (rows, stop))
        return self._sharded(name, (rows, columns), box, local, 0, initial=output)

    def _kv_rows(self) -> tuple[int, int]:
        """The rows of the key (or value) projection: a part of the heads, or one shared head."""
        model, dim = self.model, self.model.dim_per_head
        if model.kv_heads % self.parts == 0:
            return self._split(model.kv_heads * dim)
        head = self.index * model.kv_heads // self.parts
        return head * dim, (head + 1) * dim

    def _kv(self, name: str, shape: tuple[int, int], local: str, local_row: int) -> ParameterSpec:
        start, stop = self._kv_rows()
        copies = (self.index,)
        if self.model.kv_heads % self.parts:
            per_head = self.parts // self.model.kv_heads
            first = self.index // per_head * per_head
            copies = tuple(range(first, first + per_head))
        return ParameterSpec(
            name=name,
            shape=shape,
            box=Box((start, 0), (stop, shape[1])),
            local=local,
            local_row=local_row,
            initial=self._normal(),
            decay=True,
            copies=copies,
            summed=copies if len(copies) > 1 else (),
        )

    def _sharded(
        self,
        name: str,
        shape: tuple[int, int],
        box: Box,
        local: str,
        local_row: int,
        tied_use: int = 0,
        initial: Initial | None = None,
    ) -> ParameterSpec:
        return ParameterSpec(
            name=name,
            shape=shape,
            box=box,
            local=local,
            local_row=local_row,
            initial=initial or self._normal(),
            decay=True,
            copies=(self.index,),
            tied_use=tied_use,
        )


class _Costs:
    """The costs of one micro-batch: floating-point operations, and bytes kept for backward.

    Matrix products count 2 operations per multiply-add, causal attention half of its square. Bytes
    follow the tensors that the modules save (Korthikanti et al. 2022, section 4, counts a standard
    layer).
    """

    def __init__(
        self,
        model: ModelConfig,
        tensor: int,
        sequence_parallel: bool,
        seq_len: int,
        micro_batch: int,
        precision: str,
    ) -> None:
        size = PRECISIONS[precision].bytes
        tokens, dim = seq_len * micro_batch, model.dim_per_head
        attention = model.heads * dim
        projected = attention + 2 * model.kv_heads * dim
        weights = model.hidden * (projected + attention + 3 * model.intermediate)
        self.core_flops = 2.0 * tokens * seq_len * attention
        self.layer_flops = 2.0 * tokens * weights + self.core_flops
        self.head_flops = 2.0 * tokens * model.hidden * model.vocab
        split = tensor if sequence_parallel else 1
        hidden_bytes = tokens * model.hidden * size // split
        # Each head has a copy of its keys where slices do not divide these (context_parallel).
        self.keys_bytes = 2 * tokens * attention * (size + max(4, size)) // tensor
        core_bytes = tokens * size * (projected + 2 * attention) // tensor
        mlp_bytes = tokens * size * 4 * model.intermediate // tensor
        kept = 4 * hidden_bytes + mlp_bytes + tokens * size * attention // tensor
        self.hidden_bytes = hidden_bytes
        self.layer_activation_bytes = {
            "none": kept + core_bytes,
            "selective": kept + tokens * size * projected // tensor,
            "full": hidden_bytes,
        }
        self.layer_recompute_flops = {
            "none": 0.0,
            "selective": self.core_flops,
            "full": self.layer_flops,
        }
        self.embedding_activation_bytes = 9 * tokens
        wide = max(4, size)
        self.logits_bytes = tokens * model.vocab * wide // tensor
        self.chunk_entry_bytes = tokens * wide

    def head_activation_bytes(self, vocab_chunk: int) -> int:
        """What the head keeps, with the one chunk of logits that is in memory while it computes."""
        chunk = vocab_chunk * self.chunk_entry_bytes
        return 2 * self.hidden_bytes + (chunk or self.logits_bytes)
