"""Random models through every written format: A to B to A is the identity."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from holdfast.checkpoint import save
from holdfast.checkpoint.convert.elements.output import Unit
from holdfast.checkpoint.convert.elements.pieces import Location, LogicalTensor, SourcePiece
from holdfast.checkpoint.convert.sources.engine import Engine
from holdfast.checkpoint.format.dtypes import TORCH_DTYPES
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout.boxes import Box
from support.foreign.conversions import converted, tensors_of


class Model(nn.Module):
    def __init__(self, parameters: list[Tensor], buffers: list[Tensor]) -> None:
        super().__init__()
        for number, value in enumerate(parameters):
            self.register_parameter(f"p{number}", nn.Parameter(value))
        for number, value in enumerate(buffers):
            self.register_buffer(f"b{number}", value)


def values(engine: Engine, unit: Unit) -> Tensor:
    content = bytearray(engine.content(unit))
    return torch.frombuffer(content, dtype=TORCH_DTYPES[unit.dtype]).view(unit.box.shape)


shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    weights=st.lists(
        st.tuples(shapes, st.sampled_from(["F32", "BF16", "F16"])), min_size=1, max_size=5
    ),
    buffers=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=2).map(tuple),
            st.sampled_from(["F32", "I64", "BOOL", "U8"]),
        ),
        max_size=2,
    ),
    trained=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_model_comes_back_from_every_format(
    weights: list[tuple[tuple[int, ...], str]],
    buffers: list[tuple[tuple[int, ...], str]],
    trained: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = Model(
        [torch.randn(shape).to(TORCH_DTYPES[dtype]) for shape, dtype in weights],
        [(torch.randn(shape) * 3).to(TORCH_DTYPES[dtype]) for shape, dtype in buffers],
    )
    state: dict[str, object] = {"model": model}
    if trained:
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        state["optimizer"] = optimizer
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        save(root / "first", state, step=5)
        first = tensors_of(root / "first")
        lost: dict[str, tuple[str, ...]] = {"dcp": (), "hf": ("step.", "exp_avg")}
        if all(dtype == "F32" for _, dtype in weights):
            # The universal format keeps states in 32 bits, and one count of steps.
            lost["deepspeed-universal"] = ("step.",)
        for to, left_out in lost.items():
            converted(root / "first", root / to, to)
            converted(root / to, root / f"{to}-back", "holdfast")
            again = tensors_of(root / f"{to}-back")
            expected = {n: value for n, value in first.items() if not n.startswith(left_out)}
            assert again.keys() == expected.keys(), to
            for name, value in expected.items():
                assert again[name].dtype == value.dtype
                assert torch.equal(again[name], value), (to, name)


@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    gap=st.integers(0, 3),
    most=st.sampled_from([1, 64, 1 << 20]),
    data=st.data(),
)
def test_any_strides_are_read(shape: list[int], gap: int, most: int, data: st.DataObject) -> None:
    """A box with any order of dimensions, gaps between rows, and small or large runs."""
    order = data.draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step = step * shape[dim] + gap
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.checkpoint.convert.sources.engine.SLOT_BYTES", most)
        patch.setattr("holdfast.checkpoint.convert.elements.regions.SMALLEST_RUN_BYTES", most // 2)
        whole = torch.arange(step + 5, dtype=torch.int32)
        (Path(temporary) / "file").write_bytes(whole.numpy().tobytes())
        location = Location("file", 8, tuple(strides))
        full = Box.whole(shape)
        tensor = LogicalTensor(
            "w", "weight", "I32", tuple(shape), (SourcePiece(full, (location,)),)
        )
        start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
        box = Box(start, stop)
        with Engine(Path(temporary), None) as engine:
            found = values(engine, Unit(tensor, box, "I32", "", 0))
        expected = whole[2:].as_strided(shape, strides)[box.slices]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("combine", ["sum", "mean", "equal"])
def test_locations_combine_as_the_rule_says(tmp_path: Path, combine: str) -> None:
    parts = torch.randn(3, 4, 5)
    (tmp_path / "file").write_bytes(parts.numpy().tobytes())
    locations = tuple(Location("file", 80 * number, (5, 1)) for number in range(3))
    whole = Box.whole((4, 5))
    tensor = LogicalTensor("w", "weight", "F32", (4, 5), (SourcePiece(whole, locations),), combine)
    with Engine(tmp_path, None) as engine:
        unit = Unit(tensor, whole, "F32", "", 0)
        if combine == "equal":
            with pytest.raises(CheckpointError, match="differ in 20 of 20 elements"):
                values(engine, unit)
            return
        total = parts[0] + parts[1] + parts[2]
        assert torch.equal(values(engine, unit), total / 3 if combine == "mean" else total)


def test_no_location_is_zeros(tmp_path: Path) -> None:
    tensor = LogicalTensor("w", "weight", "F32", (3,), (SourcePiece(Box((0,), (3,)), ()),))
    with Engine(tmp_path, None) as engine:
        unit = Unit(tensor, Box((0,), (3,)), "F32", "", 0)
        assert torch.equal(values(engine, unit), torch.zeros(3))
