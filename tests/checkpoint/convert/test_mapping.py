"""Mapping rules: fused, cut, stacked, padded, flat and averaged tensors against torch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from holdfast.checkpoint.convert.elements.pieces import LogicalTensor, flat_boxes
from holdfast.checkpoint.convert.rules.mapping import Mapped, map_tensors
from holdfast.checkpoint.convert.rules.patterns import Pattern, evaluate
from holdfast.checkpoint.convert.rules.rules import find_values, parse_rules
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.layout.boxes import Box
from support.foreign.source_in_memory import Source, numbers


def mapped(source: Source, text: str, **values: int) -> Mapped:
    book = parse_rules(f'format = "test"\n{text}', "rules.toml")
    return map_tensors(book, source.tensors, find_values(book, {}, values), "source")


def by_name(found: Mapped) -> dict[str, LogicalTensor]:
    return {tensor.full_name: tensor for tensor in found.tensors}


FUSED = """
[[rule]]
source = "decoder.qkv"
stack = "layer"
is = "shard"
dim = 1
groups = "kv_heads"
parts = [
  { target = "layers.{layer}.q", size = "heads / kv_heads * head_dim" },
  { target = "layers.{layer}.k", size = "head_dim" },
  { target = "layers.{layer}.v", size = "head_dim" },
]
"""


@given(
    layers=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    hidden=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_interleaved_heads_of_stacked_layers_come_apart(
    layers: int,
    kv_heads: int,
    queries: int,
    head_dim: int,
    hidden: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    tensor = data.draw(st.sampled_from([n for n in (1, 2, 4) if kv_heads % n == 0]))
    q = numbers(layers, kv_heads * queries * head_dim, hidden, dtype=dtype)
    k, v = (numbers(layers, kv_heads * head_dim, hidden, dtype=dtype) + n for n in (1, 2))
    fused = torch.cat(
        [
            q.view(layers, kv_heads, queries * head_dim, hidden),
            k.view(layers, kv_heads, head_dim, hidden),
            v.view(layers, kv_heads, head_dim, hidden),
        ],
        dim=2,
    ).reshape(layers, -1, hidden)
    source = Source()
    for index, shard in enumerate(fused.chunk(tensor, dim=1)):
        source.add("decoder.qkv", shard, tp=index)
    found = by_name(
        mapped(source, FUSED, heads=kv_heads * queries, kv_heads=kv_heads, head_dim=head_dim)
    )
    assert len(found) == 3 * layers
    for layer in range(layers):
        for name, whole in (("q", q), ("k", k), ("v", v)):
            read = source.read(found[f"layers.{layer}.{name}"], dtype)
            assert torch.equal(read, whole[layer])


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 7),
    deep=st.integers(1, 4),
    dims=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 1200), max_size=6),
    padding=st.integers(0, 9),
)
def test_flat_fragments_make_up_the_tensor(
    rows: int, columns: int, deep: int, dims: int, cuts: list[int], padding: int
) -> None:
    value = numbers(*(rows, columns, deep)[:dims])
    flat = torch.cat([value.reshape(-1), torch.full((padding,), 7.0)])
    places = [0, *sorted(min(cut, flat.numel()) for cut in cuts), flat.numel()]
    source = Source()
    for index, (start, stop) in enumerate(pairwise(places)):
        source.add("w", flat[start:stop], full=tuple(value.shape), dp=index)
    rule = '[[rule]]\nsource = "{name}"\ntarget = "{name}"\nfragments = "dp"'
    [tensor] = mapped(source, rule).tensors
    assert torch.equal(source.read(tensor, torch.float32), value)
    boxes = list(flat_boxes(places[0], places[1], value.shape))
    assert len(boxes) <= 2 * dims - 1


@given(
    vocab=st.integers(1, 30), padding=st.integers(0, 9), shards=st.integers(1, 3), odd=st.booleans()
)
def test_padding_is_stripped_from_shards_of_any_size(
    vocab: int, padding: int, shards: int, odd: bool
) -> None:
    value = numbers(vocab, 3)
    padded = torch.cat([value, torch.zeros(padding, 3)])
    source = Source()
    cuts = padded.chunk(shards) if odd else padded.tensor_split(shards)
    for index, shard in enumerate(cuts):
        source.add("embed", shard, tp=index)
    rule = '[[rule]]\nsource = "embed"\ntarget = "embed"\nis = "shard"\nstrip = { size = "vocab" }'
    [tensor] = mapped(source, rule, vocab=vocab).tensors
    assert torch.equal(source.read(tensor, torch.float32), value)


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_partial_sums_and_averages_take_every_shard(form: str) -> None:
    source, parts = Source(), [numbers(4, 3) + n for n in range(3)]
    for index, part in enumerate(parts):
        source.add("norm", part, tp=index)
    [tensor] = mapped(source, f'[[rule]]\nsource = "norm"\ntarget = "norm"\nis = "{form}"').tensors
    total = parts[0] + parts[1] + parts[2]
    expected = total / 3 if form == "mean" else total
    assert torch.equal(source.read(tensor, torch.float32), expected)


def test_transposed_and_grouped_experts() -> None:
    source, value = Source(), numbers(3, 4, 10)
    source.add("experts.gate_up", value)
    rule = """
    [[rule]]
    source = "experts.gate_up"
    stack = "expert"
    transpose = true
    fused_dim = 1
    parts = [
      { target = "experts.{expert}.gate.weight", size = 5 },
      { target = "experts.{expert}.up.weight", size = 5 },
    ]
    """
    found = by_name(mapped(source, rule))
    for expert in range(3):
        gate, up = value[expert].split(5, dim=1)
        for name, expected in (("gate", gate.t()), ("up", up.t())):
            tensor = found[f"experts.{expert}.{name}.weight"]
            assert tensor.shape == (5, 4)
            assert torch.equal(source.read(tensor, torch.float32), expected)


def test_shards_of_two_joined_tensors_become_one() -> None:
    """A parameter_with_2_sub_params_cat_dim_0: each shard has its gate rows, then its up rows."""
    gate, up = numbers(6, 3), numbers(6, 3) + 1
    source = Source()
    for index in range(3):
        pair = torch.cat([gate.chunk(3)[index], up.chunk(3)[index]]).reshape(-1)
        for part, fragment in enumerate(pair.split(5)):
            source.add("up", fragment, (4, 3), tp=index, dp=part)
    rule = """
    [[rule]]
    source = "up"
    is = "shard"
    fragments = "dp"
    groups = "shards"
    parts = [{ target = "gate_up", size = 2 }, { target = "gate_up", size = 2 }]
    """
    [tensor] = mapped(source, rule).tensors
    assert torch.equal(source.read(tensor, torch.float32), torch.cat([gate, up]))


def test_copies_along_other_axes_are_all_listed() -> None:
    source, value = Source(), numbers(4, 2)
    for stage in range(2):
        for index, shard in enumerate(value.chunk(2)):
            source.add("embed", shard, tp=index, pp=stage)
    [tensor] = mapped(source, '[[rule]]\nsource="embed"\ntarget="embed"\nis="shard"').tensors
    assert [len(piece.locations) for piece in tensor.pieces] == [2, 2]
    assert torch.equal(source.read(tensor, torch.float32), value)


def test_states_follow_the_rules_of_their_weights() -> None:
    source, value = Source(), numbers(4, 2)
    for prefix in ("", "optimizer.state.exp_avg."):
        source.add(f"{prefix}fc", value)
    source.add("fc._extra_state", numbers(1))
    rules = """
    [[state]]
    source = "optimizer.state.exp_avg.{key}"
    kind = "exp_avg"
    [[skip]]
    source = "*._extra_state"
    because = "of the kernels"
    [[rule]]
    source = "fc"
    parts = [{ target = "gate", size = 2 }, { target = "up", size = 2 }]
    """
    found = mapped(source, rules)
    assert sorted(by_name(found)) == ["exp_avg.gate", "exp_avg.up", "gate", "up"]
    assert found.left_out == {"fc._extra_state": "of the kernels"}
    assert found.by_rule == {"fc": 2}


BROKEN = [
    ('target = "w"', {"tp": 1}, "shard 0 along tp is missing"),
    ('target = "w"\nstrip = { size = "vocab" }', {}, "--value vocab=NUMBER"),
    ('target = "w"\nstrip = { size = 5 }', {}, "fewer than the 5"),
    ('target = "w"\nis = "shard"\ndim = 2', {}, "cuts dimension 2"),
    ('parts = [{ target = "a", size = 3 }, { target = "b", size = 2 }]', {}, r"\(3 \+ 2\) = 5"),
    ('parts = [{ target = "a", size = "rows / 3" }]', {}, "4 cannot be divided by 3"),
    ('target = "w"\nfragments = "dp"', {"dp": 0}, "shape of the tensor that its fragments"),
]


@pytest.mark.parametrize(("rule", "shard", "message"), BROKEN)
def test_what_does_not_fit_is_named(rule: str, shard: dict[str, int], message: str) -> None:
    source = Source()
    source.add("w", numbers(4, 2), None, **shard)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        mapped(source, f'[[rule]]\nsource = "w"\n{rule}', rows=4)
    assert "w" in str(caught.value)


def test_an_unknown_tensor_and_two_whole_ones_are_named() -> None:
    source = Source()
    source.add("w", numbers(4, 2), tp=0)
    source.add("w", numbers(4, 2), tp=1)
    with pytest.raises(CheckpointError, match=r"no rule of test fits w \(tp 0\) F32 \[4, 2\]"):
        mapped(source, '[[rule]]\nsource = "v"\ntarget = "v"')
    with pytest.raises(CheckpointError, match="cut into 2 shards along tp"):
        mapped(source, '[[rule]]\nsource = "w"\ntarget = "w"')
    source.add("w", numbers(4, 3), tp=2)
    with pytest.raises(CheckpointError, match="may differ along dimension 0 only"):
        mapped(source, '[[rule]]\nsource = "w"\ntarget = "w"\nis = "shard"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = 3", "format"),
        ('format = "x"\nrulez = []', "rulez"),
        ('format = "x"\n[[rule]]\nsource = "a"', "either target or parts"),
        ('format = "x"\n[[rule]]\nsource = "a"\ntarget = "b.{layer}"', "layer"),
        ('format = "x"\n[[rule]]\nsource = "a"\ntarget = "b"\nis = "cut"', "cut"),
        ('format = "x"\n[[state]]\nsource = "m.*"\nkind = "exp_avg"', "{key}"),
        ("format = ", "rules.toml"),
    ],
)
def test_wrong_rules_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rules(text, "rules.toml")


def test_patterns_capture_and_fill() -> None:
    pattern = Pattern("model.layers.{layer:d}.{rest}")
    assert pattern.match("model.layers.12.mlp.up.weight") == {
        "layer": "12",
        "rest": "mlp.up.weight",
    }
    assert pattern.match("model.layers.x.mlp") is None
    assert Pattern("a.{x}.{x}").match("a.1.2") is None
    assert Pattern("a+b*").match("aab") is None
    assert pattern.fill({"layer": "3", "rest": "w"}) == "model.layers.3.w"
    state = Pattern("state.{kind:w}.{key}")
    assert state.match("state.exp_avg.layers.0.w") == {"kind": "exp_avg", "key": "layers.0.w"}
    assert state.match("state.a-b.w") is None
    assert state.fill({"kind": "momentum", "key": "w"}) == "state.momentum.w"


def test_expressions() -> None:
    assert (
        evaluate("heads / kv_heads * (dim + 1)", {"heads": 8, "kv_heads": 2, "dim": 3}, "x") == 16
    )
    for bad in ("heads // 3", "__import__('os')", "2 ** 8", "heads.real", "1 +"):
        with pytest.raises(ConfigError):
            evaluate(bad, {"heads": 8}, "x")


def test_values_are_found_or_computed() -> None:
    book = parse_rules(
        'format = "x"\n[values]\nheads = ["args.heads", "config.heads"]\n'
        'dim = ["args.dim", "= hidden / heads"]\nhidden = ["args.hidden"]',
        "rules.toml",
    )
    told = {"args": {"heads": None, "hidden": 64}, "config": {"heads": 4}}
    assert find_values(book, told, {}) == {"heads": 4, "hidden": 64, "dim": 16}
    assert find_values(book, told, {"hidden": 32})["dim"] == 8


def test_whole_boxes_only() -> None:
    assert list(flat_boxes(3, 4, ())) == [Box((), ())]
    assert list(flat_boxes(2, 2, (4, 2))) == []
