"""Rules read backwards: what they put together they take apart again, element for element."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from holdfast.checkpoint.convert.elements.pieces import LogicalTensor, SourceTensor
from holdfast.checkpoint.convert.rules.inverse import cut, map_back, state_name
from holdfast.checkpoint.convert.rules.mapping import map_tensors
from holdfast.checkpoint.convert.rules.rules import RuleBook, builtin_rules, parse_rules
from holdfast.parallel.errors import CheckpointError
from support.foreign.source_in_memory import Source, numbers

RULES = """
format = "theirs"
[[state]]
source = "moment/{key}"
kind = "exp_avg"
[[rule]]
source = "blocks.old"
stack = "layer"
target = "layers.{layer}.a"
written = false
[[rule]]
source = "table"
target = "embed"
strip = { size = "vocab", multiple = "multiple" }
[[rule]]
source = "blocks.qkv"
stack = "layer"
groups = "groups"
transpose = true
fused_dim = 1
parts = [
  { target = "layers.{layer}.q", size = "heads / groups * dim" },
  { target = "layers.{layer}.kv", size = "dim" },
  { target = "layers.{layer}.kv", size = "dim" },
]
[[rule]]
source = "blocks.experts"
stack = ["layer", "expert"]
target = "layers.{layer}.experts.{expert}.w"
[[rule]]
source = "blocks.with"
stack = "layer"
target = "layers.{layer}.norm"
if_target = "layers.{layer}.experts.0.w"
[[rule]]
source = "blocks.without"
stack = "layer"
target = "layers.{layer}.norm"
"""


SHARDED = """
format = "theirs"
[[rule]]
written = ["ranks"]
source = "table"
target = "embed"
is = "shard"
strip = { size = "vocab", multiple = "multiple" }
[[rule]]
written = ["ranks"]
source = "{layer:d}.qkv"
is = "shard"
groups = "groups"
parts = [
  { target = "layers.{layer}.q", size = "heads / groups * dim" },
  { target = "layers.{layer}.kv", size = "dim" },
  { target = "layers.{layer}.kv", size = "dim" },
]
[[rule]]
written = ["ranks"]
source = "{layer:d}.fc1"
is = "shard"
groups = "shards"
parts = [
  { target = "layers.{layer}.gate", size = "wide / shards" },
  { target = "layers.{layer}.up", size = "wide / shards" },
]
[[rule]]
written = ["ranks"]
source = "{layer:d}.fc2"
target = "layers.{layer}.down"
is = "shard"
dim = 1
[[rule]]
written = ["ranks"]
source = "{layer:d}.norm"
target = "layers.{layer}.norm"
is = "replicated"
"""


def in_memory(weights: dict[str, Tensor]) -> tuple[Source, list[LogicalTensor]]:
    """Tensors of a model, whose names begin with "exp_avg:" where they are moments."""
    source = Source()
    for key, value in weights.items():
        source.add(key, value)
    found = []
    for tensor in source.tensors:
        kind, _, name = tensor.key.rpartition(":")
        found.append(
            LogicalTensor(name, kind or "weight", tensor.dtype, tensor.shape, tensor.pieces)
        )
    return source, found


def theirs(book: RuleBook, tensors: list[LogicalTensor], **values: int) -> dict[str, LogicalTensor]:
    made = map_back(book, [(tensor, tensor.dtype) for tensor in tensors], values, "here")
    return {one.tensor.name: one.tensor for one in made}


@settings(max_examples=40)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(0, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 2),
    dim=st.integers(1, 3),
    vocab=st.integers(1, 9),
    multiple=st.integers(1, 8),
    trained=st.booleans(),
)
def test_a_model_comes_back(
    layers: int,
    experts: int,
    groups: int,
    per_group: int,
    dim: int,
    vocab: int,
    multiple: int,
    trained: bool,
) -> None:
    heads = groups * per_group
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocab, 4)}
    for layer in range(layers):
        shapes[f"layers.{layer}.q"] = (heads * dim, 5)
        shapes[f"layers.{layer}.kv"] = (2 * groups * dim, 5)
        shapes[f"layers.{layer}.norm"] = (5,)
        for expert in range(experts):
            shapes[f"layers.{layer}.experts.{expert}.w"] = (3, 2)
    weights = {
        f"{kind}{name}": torch.randn(shape)
        for kind in (("", "exp_avg:") if trained else ("",))
        for name, shape in shapes.items()
    }
    source, tensors = in_memory(weights)
    values = {"heads": heads, "groups": groups, "dim": dim, "vocab": vocab, "multiple": multiple}
    book = parse_rules(RULES, "rules.toml")
    found = theirs(book, tensors, **values)
    norm = "blocks.with" if experts else "blocks.without"
    kinds = ("", "moment/") if trained else ("",)
    names = {"table", "blocks.qkv", norm} | ({"blocks.experts"} if experts else set())
    assert found.keys() == {kind + name for kind in kinds for name in names}
    padded = -(-vocab // multiple) * multiple
    assert found["table"].shape == (padded, 4)
    # Their first group has its queries, its key and its value, as rows that lie as columns.
    grouped = source.read_padded(found["blocks.qkv"])[0, :, : (per_group + 2) * dim]
    q, kv = weights["layers.0.q"], weights["layers.0.kv"]
    expected = torch.cat(
        [q[: per_group * dim], kv[:dim], kv[groups * dim :][:dim]],
    )
    assert torch.equal(grouped, expected.T)
    again = map_tensors(
        book,
        [SourceTensor(n, t.dtype, t.shape, t.pieces) for n, t in found.items()],
        values,
        "there",
    )
    assert len(again.tensors) == len(tensors)
    for tensor in again.tensors:
        key = tensor.name if tensor.kind == "weight" else f"{tensor.kind}:{tensor.name}"
        assert torch.equal(source.read(tensor, torch.float32), weights[key])


@settings(max_examples=40)
@given(
    shards=st.integers(1, 4),
    layers=st.integers(1, 2),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 2),
    dim=st.integers(1, 3),
    wide=st.integers(1, 3),
    vocab=st.integers(1, 9),
    multiple=st.integers(1, 3),
)
def test_shards_of_any_number_make_up_the_model(
    shards: int,
    layers: int,
    groups: int,
    per_group: int,
    dim: int,
    wide: int,
    vocab: int,
    multiple: int,
) -> None:
    groups, wide, multiple = shards * groups, shards * wide, shards * multiple
    heads = groups * per_group
    weights = {"embed": torch.randn(vocab, 4)}
    for layer in range(layers):
        weights[f"layers.{layer}.q"] = torch.randn(heads * dim, 5)
        weights[f"layers.{layer}.kv"] = torch.randn(2 * groups * dim, 5)
        weights[f"layers.{layer}.gate"] = torch.randn(wide, 5)
        weights[f"layers.{layer}.up"] = torch.randn(wide, 5)
        weights[f"layers.{layer}.down"] = torch.randn(5, wide)
        weights[f"layers.{layer}.norm"] = torch.randn(5)
    source, tensors = in_memory(weights)
    values = {"heads": heads, "groups": groups, "dim": dim, "wide": wide}
    values |= {"vocab": vocab, "multiple": multiple}
    book = parse_rules(SHARDED, "rules.toml")
    typed = [(tensor, tensor.dtype) for tensor in tensors]
    made = map_back(book, typed, values, "here", form="ranks", shards=shards)
    ranks = [[cut(one, rank, shards, "here") for one in made] for rank in range(shards)]
    # Each rank has its gate rows, then its up rows.
    first = {tensor.name: tensor for tensor in ranks[0]}["0.fc1"]
    expected = [weights[f"layers.0.{name}"][: wide // shards] for name in ("gate", "up")]
    assert torch.equal(source.read(first, torch.float32), torch.cat(expected))
    theirs = [
        SourceTensor(t.name, t.dtype, t.shape, t.pieces, (("tp", rank),))
        for rank, members in enumerate(ranks)
        for t in members
    ]
    again = map_tensors(book, theirs, values, "there").tensors
    assert {tensor.name for tensor in again} == weights.keys()
    for tensor in again:
        assert torch.equal(source.read(tensor, torch.float32), weights[tensor.name])


def test_padding_is_zeros_and_the_rest_is_not_touched() -> None:
    weights = {"embed": numbers(5, 4)}
    source, tensors = in_memory(weights)
    found = theirs(parse_rules(RULES, "rules.toml"), tensors, vocab=5, multiple=4)
    table = source.read_padded(found["table"])
    assert torch.equal(table[:5], weights["embed"])
    assert not table[5:].any()


def test_parts_combine_alike() -> None:
    _, tensors = in_memory({"layers.0.norm": numbers(5), "layers.1.norm": numbers(5)})
    mixed = [tensors[0], replace(tensors[1], combine="sum")]
    with pytest.raises(CheckpointError, match="combine"):
        theirs(parse_rules(RULES, "rules.toml"), mixed)


def test_states_are_named_as_they_will_be_read() -> None:
    book = builtin_rules("megatron")

    def name(kind: str) -> str | None:
        found = state_name(book, kind)
        return None if found is None else found.fill({"key": "decoder.norm"})

    assert name("weight") == "decoder.norm"
    assert name("master") == "optimizer.state.param.decoder.norm"
    assert name("momentum") == "optimizer.state.momentum.decoder.norm"
    # These would come back as master copies, and as a weight's name that begins with "b.".
    assert name("param") is None
    assert name("a.b") is None
