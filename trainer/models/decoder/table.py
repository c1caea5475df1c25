"""The parameter table of a decoder; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from holdfast.parallel.layout import Box, HeadRows, Initial, LayerSpec, ParameterSpec, even_range
from holdfast.trainer.models.decoder.costs import Costs
from holdfast.trainer.models.decoder.section import (
    DecoderConfig,
    Design,
    ExpertDesign,
    LatentDesign,
)


def layer_specs(
    model: DecoderConfig,
    design: Design,
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
    tables = [_Table(model, design, parts, index, sums_parts, shards > 1) for index in range(parts)]
    costs = Costs(model, design, tensor, sequence_parallel, seq_len, micro_batch, precision)
    transformer = [
        LayerSpec(
            name=f"block.{i}",
            parameters=tuple(design.as_stored(table.transformer(i)) for table in tables),
            forward_flops=costs.layer_flops(i),
            activation_bytes=costs.layer_activation_bytes(i, how),
            output_bytes=costs.hidden_bytes,
            recompute=how,
            recompute_flops=costs.recompute_flops(i, how),
            attention_flops=costs.core_flops(i),
            keys_bytes=costs.keys_bytes,
        )
        for i, how in enumerate(of_layers)
    ]
    embedding = LayerSpec(
        name="embedding",
        parameters=tuple(design.as_stored(table.embedding()) for table in tables),
        forward_flops=0.0,
        activation_bytes=costs.embedding_activation_bytes,
        output_bytes=costs.hidden_bytes,
        forward_only=True,
    )
    return (embedding, *transformer, _head(tables, costs, of_layers[-1], vocab_chunk))


def _head(tables: Sequence[_Table], costs: Costs, recompute: str, vocab_chunk: int) -> LayerSpec:
    """The row of the head, with that of the layer that predicts a further token.

    Args:
        recompute: what that layer recomputes.
    """
    further, layer = int(tables[0].design.multi_token is not None), tables[0].model.layers
    head = LayerSpec(
        name="head",
        parameters=tuple(table.design.as_stored(table.head()) for table in tables),
        forward_flops=costs.head_flops(further),
        activation_bytes=costs.head_activation_bytes(vocab_chunk, further),
        output_bytes=8,
        recompute="logits" if vocab_chunk else "none",
        recompute_flops=costs.head_flops(further) if vocab_chunk else 0.0,
        vocab_chunk=vocab_chunk,
    )
    if not further:
        return head
    return replace(
        head,
        forward_flops=head.forward_flops + costs.multi_token_flops(layer),
        activation_bytes=head.activation_bytes
        + costs.multi_token_activation_bytes(layer, recompute),
        recompute=head.recompute if recompute == "none" else recompute,
        recompute_flops=head.recompute_flops + costs.recompute_flops(layer, recompute),
        attention_flops=costs.core_flops(layer),
        keys_bytes=costs.keys_bytes,
    )


def shares_heads(model: DecoderConfig, parts: int, is_sharded: bool) -> bool:
    """Whether several parts of a rank may have a key and value head in common.

    Queries, keys and values are matrices of their own then, so that a rank has each once.
    """
    return is_sharded and model.kv_heads % parts != 0


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of one part."""

    model: DecoderConfig
    design: Design
    parts: int
    index: int
    norms_differ: bool
    """Whether the norms of each part see other tokens."""
    is_sharded: bool
    """Whether one rank may have several parts."""

    def embedding(self) -> tuple[ParameterSpec, ...]:
        tokens = self._vocabulary("model.embed_tokens.weight", "weight", 0)
        if not self.design.learned_positions:
            return (tokens,)
        positions = (self.model.max_seq_len, self.model.hidden)
        return tokens, self._rows("model.embed_positions.weight", positions, "positions", 0)

    def head(self) -> tuple[ParameterSpec, ...]:
        norm = self._norm("model.norm", "norm")
        if self.model.tie_embeddings:
            return *norm, self._vocabulary("model.embed_tokens.weight", "projection", 1)
        projection = self._vocabulary("lm_head.weight", "projection", 0)
        if self.design.multi_token is None:
            return *norm, projection
        return *norm, projection, *self._multi_token()

    def _multi_token(self) -> tuple[ParameterSpec, ...]:
        """The layer behind the last one, by its published names, and its use of the embedding."""
        prefix, hidden = f"model.layers.{self.model.layers}", self.model.hidden
        shape = (hidden, 2 * hidden)
        joining = self._whole(
            f"{prefix}.eh_proj.weight",
            shape,
            "further.joining",
            self._normal(shape),
            parts_differ=self.norms_differ,
        )
        return (
            self._vocabulary("model.embed_tokens.weight", "further.embedding.weight", 1),
            *self._norm(f"{prefix}.enorm", "further.embedding_norm"),
            *self._norm(f"{prefix}.hnorm", "further.hidden_norm"),
            joining,
            *(
                replace(row, local=f"further.layer.{row.local}")
                for row in self.transformer(self.model.layers)
            ),
            *self._norm(f"{prefix}.shared_head.norm", "further.norm"),
        )

    def transformer(self, layer: int) -> tuple[ParameterSpec, ...]:
        prefix, latent = f"model.layers.{layer}", self.design.latent
        attention, experts = f"{prefix}.self_attn", self.design.experts_of(layer)
        return (
            *self._norm(f"{prefix}.input_layernorm", "attention_norm"),
            *(
                self._attention(attention, layer)
                if latent is None
                else self._latent(attention, latent, layer)
            ),
            *self._norm(f"{prefix}.post_attention_layernorm", "mlp_norm"),
            *(
                self._mlp(f"{prefix}.mlp", "mlp", self.model.intermediate)
                if experts is None
                else self._experts(prefix, experts)
            ),
        )

    def _attention(self, prefix: str, layer: int) -> tuple[ParameterSpec, ...]:
        model, design = self.model, self.design
        queries = (model.heads * model.dim_per_head, model.hidden)
        output = self._columns(f"{prefix}.o_proj.weight", queries[::-1], "attention.output")
        rows = [*self._clipped(self._projections(prefix, queries[0]), layer), output]
        if design.qkv_bias:
            rows += self._clipped(self._projections(prefix, queries[0], "bias"), layer)
        if design.output_bias:
            rows.append(self._hidden_bias(f"{prefix}.o_proj.bias", "attention.output_bias"))
        if design.head_norms:
            rows.append(self._head_norm(f"{prefix}.q_norm.weight", "attention.query_norm"))
            rows.append(self._head_norm(f"{prefix}.k_norm.weight", "attention.key_norm"))
        return tuple(rows)

    def _clipped(
        self, rows: tuple[ParameterSpec, ParameterSpec, ParameterSpec], layer: int
    ) -> tuple[ParameterSpec, ...]:
        """Queries, keys and values, with what QK-clip scales: queries and keys by half each.

        A key that several heads have in common stays: it is no one head's, so their queries are
        scaled by all of it.
        """
        query, key, value = rows
        if self.design.head_norms:
            return rows
        shares, dim = self.model.heads != self.model.kv_heads, self.model.dim_per_head
        query = replace(query, heads=HeadRows(layer + 1, ((dim, 1.0 if shares else 0.5),)))
        return query, key if shares else replace(key, heads=query.heads), value

    def _latent(self, prefix: str, latent: LatentDesign, layer: int) -> tuple[ParameterSpec, ...]:
        """Every part has the products down to the latent vectors, and those up to its heads.

        QK-clip scales what does not turn by half in queries and keys, what turns in queries alone.
        """
        of_queries = HeadRows(layer + 1, ((latent.plain, 0.5), (latent.turning, 1.0)))
        of_keys = HeadRows(layer + 1, ((latent.plain, 0.5), (latent.value, 0.0)))
        model, wide = self.model, latent.rank + latent.turning
        queries = (model.heads * latent.key, latent.query_rank or model.hidden)
        values = (model.heads * latent.value, model.hidden)
        down: list[ParameterSpec] = []
        if latent.query_rank:
            down = [
                self._down(f"{prefix}.q_a_proj.weight", latent.query_rank, 0),
                self._latent_norm(f"{prefix}.q_a_layernorm.weight", latent.query_rank, "query"),
            ]
        name = "q_b_proj" if latent.query_rank else "q_proj"
        query = self._rows(f"{prefix}.{name}.weight", queries, "attention.query", 0)
        key_value = self._rows(
            f"{prefix}.kv_b_proj.weight",
            (model.heads * (latent.plain + latent.value), latent.rank),
            "attention.key_value",
            0,
        )
        return (
            *down[:1],
            self._down(f"{prefix}.kv_a_proj_with_mqa.weight", wide, latent.query_rank),
            *down[1:],
            self._latent_norm(f"{prefix}.kv_a_layernorm.weight", latent.rank, "key_value"),
            replace(query, heads=of_queries),
            replace(key_value, heads=of_keys),
            self._columns(f"{prefix}.o_proj.weight", values[::-1], "attention.output"),
        )

    def _down(self, name: str, rows: int, local_row: int) -> ParameterSpec:
        shape = (rows, self.model.hidden)
        whole = self._whole(
            name, shape, "attention.down", self._normal(shape), parts_differ=self.norms_differ
        )
        return replace(whole, local_row=local_row)

    def _latent_norm(self, name: str, elements: int, which: str) -> ParameterSpec:
        local = f"attention.{which}_norm.weight"
        return self._vector(name, elements, local, 1.0, parts_differ=self.norms_differ)

    def _mlp(self, prefix: str, local: str, width: int) -> tuple[ParameterSpec, ...]:
        """The projections of an MLP of some width, which is the layer's module `local`."""
        wide = (width, self.model.hidden)
        names = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        if self.design.gelu:
            return (
                self._rows(f"{names[1]}.weight", wide, f"{local}.up", 0),
                self._columns(f"{prefix}.down_proj.weight", wide[::-1], f"{local}.down"),
                self._rows(f"{names[1]}.bias", wide[:1], f"{local}.up_bias", 0),
                self._hidden_bias(f"{prefix}.down_proj.bias", f"{local}.down_bias"),
            )
        gate = self._rows(f"{names[0]}.weight", wide, f"{local}.gate_up", 0)
        up = self._rows(f"{names[1]}.weight", wide, f"{local}.gate_up", gate.rows)
        down = self._columns(f"{prefix}.down_proj.weight", wide[::-1], f"{local}.down")
        if not self.design.mlp_bias:
            return gate, up, down
        return (
            gate,
            up,
            down,
            self._rows(f"{names[0]}.bias", wide[:1], f"{local}.gate_up_bias", 0),
            self._rows(f"{names[1]}.bias", wide[:1], f"{local}.gate_up_bias", gate.rows),
            self._hidden_bias(f"{prefix}.down_proj.bias", f"{local}.down_bias"),
        )

    def _experts(self, prefix: str, experts: ExpertDesign) -> tuple[ParameterSpec, ...]:
        """The router, which every part has, and the experts of this part."""
        hidden, wide, router = self.model.hidden, experts.intermediate, experts.router
        rows = [
            self._whole(
                f"{prefix}.{router.weight}",
                (experts.count, hidden),
                "mlp.router",
                self._normal((experts.count, hidden)),
                parts_differ=self.norms_differ,
            )
        ]
        if router.bias_speed is not None:
            bias = self._vector(
                f"{prefix}.{router.bias}",
                experts.count,
                "mlp.router_bias",
                0.0,
                parts_differ=self.norms_differ,
            )
            rows.append(replace(bias, whole=bias.box, balance=router.bias_speed))
        if experts.shared:
            rows += self._mlp(f"{prefix}.mlp.shared_experts", "mlp.shared", experts.shared)
        first = self._split(experts.count)[0]
        for number in range(experts.count // self.parts):
            names = [f"{prefix}.{name.format(first + number)}" for name in experts.matrices]
            local, box = f"mlp.experts.{first + number}", Box((0, 0), (wide, hidden))
            own = (
                self._sharded(names[0], (wide, hidden), box, f"{local}.gate_up", 0),
                self._sharded(names[1], (wide, hidden), box, f"{local}.gate_up", wide),
                self._sharded(
                    names[2],
                    (hidden, wide),
                    Box((0, 0), (hidden, wide)),
                    f"{local}.down",
                    0,
                    initial=self._output(),
                ),
            )
            rows += [replace(spec, expert=first + number) for spec in own]
        return tuple(rows)

    def _projections(
        self, prefix: str, queries: int, kind: str = "weight"
    ) -> tuple[ParameterSpec, ParameterSpec, ParameterSpec]:
        """The weights, or the biases, of the projections to queries, keys and values."""
        model = self.model
        names = [f"{prefix}.{which}_proj.{kind}" for which in ("q", "k", "v")]
        inner = (model.hidden,) if kind == "weight" else ()
        suffix = "" if kind == "weight" else "_bias"
        wide, narrow = (queries, *inner), (model.kv_heads * model.dim_per_head, *inner)
        if self.design.inputs_first or shares_heads(model, self.parts, self.is_sharded):
            return (
                self._rows(names[0], wide, f"attention.query{suffix}", 0),
                self._kv(names[1], narrow, f"attention.key{suffix}", 0),
                self._kv(names[2], narrow, f"attention.value{suffix}", 0),
            )
        start, stop = self._kv_rows()
        share, local = queries // self.parts, f"attention.qkv{suffix}"
        return (
            self._rows(names[0], wide, local, 0),
            self._kv(names[1], narrow, local, share),
            self._kv(names[2], narrow, local, share + stop - start),
        )

    def _normal(self, shape: tuple[int, ...]) -> Initial:
        """Of a matrix normal draws, of a bias zeros."""
        return Initial("normal", self.model.init_std) if len(shape) > 1 else Initial("constant", 0)

    def _norm(self, name: str, local: str) -> tuple[ParameterSpec, ...]:
        hidden, apart = self.model.hidden, self.norms_differ
        weight = self._vector(f"{name}.weight", hidden, f"{local}.weight", 1.0, parts_differ=apart)
        if not self.design.layer_norm:
            return (weight,)
        return weight, self._hidden_bias(f"{name}.bias", f"{local}.bias")

    def _hidden_bias(self, name: str, local: str) -> ParameterSpec:
        return self._vector(name, self.model.hidden, local, 0.0, parts_differ=self.norms_differ)

    def _head_norm(self, name: str, local: str) -> ParameterSpec:
        """Each part has other heads."""
        return self._vector(name, self.model.dim_per_head, local, 1.0, parts_differ=True)

    def _vector(
        self, name: str, elements: int, local: str, initial: float, *, parts_differ: bool
    ) -> ParameterSpec:
        """A vector that every part has whole; as `_whole`."""
        constant = Initial("constant", initial)
        return self._whole(name, (elements,), local, constant, parts_differ=parts_differ)

    def _whole(
        self,
        name: str,
        shape: tuple[int, ...],
        local: str,
        initial: Initial,
        *,
        parts_differ: bool,
    ) -> ParameterSpec:
        """What every part has whole.

        Args:
            parts_differ: whether each part sees another share of its gradient.
        """
        copies = tuple(range(self.parts))
        return ParameterSpec(
            name=name,
            shape=shape,
            box=_of_rows(shape, 0, shape[0]),
            local=local,
            local_row=0,
            initial=initial,
            decay=len(shape) > 1,
            copies=copies,
            summed=copies if parts_differ and self.parts > 1 else (),
        )

    def _split(self, size: int) -> tuple[int, int]:
        return even_range(size, self.parts, self.index)

    def _vocabulary(self, name: str, local: str, tied_use: int) -> ParameterSpec:
        shape = (self.model.vocab, self.model.hidden)
        start, stop = self._split(self.model.vocab)
        return self._sharded(name, shape, Box((start, 0), (stop, shape[1])), local, 0, tied_use)

    def _rows(self, name: str, shape: tuple[int, ...], local: str, local_row: int) -> ParameterSpec:
        box = _of_rows(shape, *self._split(shape[0]))
        return self._sharded(name, shape, box, local, local_row)

    def _columns(self, name: str, shape: tuple[int, ...], local: str) -> ParameterSpec:
        rows, columns = shape
        start, stop = self._split(columns)
        box = Box((0, start), (rows, stop))
        return self._sharded(name, (rows, columns), box, local, 0, initial=self._output())

    def _output(self) -> Initial:
        """Of the weights whose products are added to the hidden state."""
        return Initial("normal", self.model.init_std / sqrt(2 * self.model.layers))

    def _kv_rows(self) -> tuple[int, int]:
        """The rows of the key (or value) projection: a part of the heads, or one shared head."""
        model, dim = self.model, self.model.dim_per_head
        if model.kv_heads % self.parts == 0:
            return self._split(model.kv_heads * dim)
        head = self.index * model.kv_heads // self.parts
        return head * dim, (head + 1) * dim

    def _kv(self, name: str, shape: tuple[int, ...], local: str, local_row: int) -> ParameterSpec:
        copies = (self.index,)
        if self.model.kv_heads % self.parts:
            per_head = self.parts // self.model.kv_heads
            first = self.index // per_head * per_head
            copies = tuple(range(first, first + per_head))
        return ParameterSpec(
            name=name,
            shape=shape,
            box=_of_rows(shape, *self._kv_rows()),
            local=local,
            local_row=local_row,
            initial=self._normal(shape),
            decay=len(shape) > 1,
            copies=copies,
            summed=copies if len(copies) > 1 else (),
        )

    def _sharded(
        self,
        name: str,
        shape: tuple[int, ...],
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
            initial=initial or self._normal(shape),
            decay=len(shape) > 1,
            copies=(self.index,),
            tied_use=tied_use,
        )


def _of_rows(shape: tuple[int, ...], start: int, stop: int) -> Box:
    """The box of some rows of a tensor."""
    return Box((start, *(0 for _ in shape[1:])), (stop, *shape[1:]))
