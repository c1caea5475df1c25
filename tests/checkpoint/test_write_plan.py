"""The write plan: every byte is written once, evenly, each file by one node."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings, strategies as st

from holdfast.checkpoint.format.files import ELEMENT_BYTES
from holdfast.checkpoint.format.plan_types import HeldBox, SavedTensor, WritePlan
from holdfast.checkpoint.saving import write_plan
from holdfast.checkpoint.saving.write_plan import make_write_plan
from holdfast.parallel.errors import LayoutError
from holdfast.parallel.layout.boxes import Box
from holdfast.trainer.step.planning import plan_of
from holdfast.trainer.step.saved_tensors import saved_tensors, state_format, wanted_boxes
from support.oracles.plan_layouts import optimizer_layout, parameter_layout
from support.runs.small_runs import make_config


def _check(plan: WritePlan, tensors: list[SavedTensor], nodes: list[int]) -> None:
    """What must be true of any plan."""
    by_name = {tensor.name: tensor for tensor in tensors}
    holders = {t.name: t.parts for t in tensors}
    held: defaultdict[str, int] = defaultdict(int)
    for file in plan.files:
        end = file.header_bytes
        for piece in file.pieces:
            assert piece.offset == end, "holes are not allowed in safetensors"
            end += piece.length
            tensor = by_name[piece.name]
            assert piece.length == piece.box.elements * ELEMENT_BYTES[tensor.dtype]
            held[piece.name] += piece.box.elements
            sources = piece.sources or (HeldBox(piece.box, (piece.writer,)),)
            assert sum(part.box.elements for part in sources) == piece.box.elements
            assert len({part.holders for part in sources}) == len(sources), "one part a rank"
            for part in sources:
                [rank] = part.holders
                assert any(
                    rank in whole.holders and whole.box.intersect(part.box) is not None
                    for whole in holders[piece.name]
                )
        assert end == file.bytes
        assert len({nodes[piece.writer] for piece in file.pieces}) <= 1
    assert held == {t.name: Box.whole(t.shape).elements for t in tensors}


layouts = st.sampled_from(
    [(t, d, p) for t in (1, 2, 4) for d in (1, 2, 3) for p in (1, 2, 3) if t * d * p <= 12]
)


@settings(max_examples=30, deadline=None)
@given(
    layout=layouts,
    ranks_per_node=st.sampled_from([1, 2, 4, 16]),
    precision=st.sampled_from(["fp32", "bf16"]),
    tie=st.booleans(),
)
def test_every_byte_is_written_once_by_a_rank_that_has_it(
    layout: tuple[int, int, int], ranks_per_node: int, precision: str, tie: bool
) -> None:
    tensor, data, pipeline = layout
    config = make_config(
        model={"tie_embeddings": tie, "heads": 4, "kv_heads": 4},
        parallel={"tensor": tensor, "data": data, "pipeline": pipeline},
        train={"precision": precision},
    )
    plan = plan_of(config)
    # A tensor-parallel group that spans nodes leaves no node with whole weights.
    per_node = max(ranks_per_node, tensor)
    nodes = [rank // per_node for rank in range(config.parallel.ranks)]
    tensors = saved_tensors(plan, state_format(config))
    made = make_write_plan(tensors, nodes)
    _check(made, tensors, nodes)
    element = 2 if precision == "bf16" else 4
    weights = sum(Box.whole(t.shape).elements for t in tensors if t.whole)
    state = (3 if precision == "bf16" else 2) * 4
    assert sum(made.written_bytes().values()) == weights * (element + state)


def test_bytes_are_even_over_the_replicas_of_a_stage() -> None:
    config = make_config(
        model={"hidden": 64, "layers": 6}, parallel={"data": 4}, optimizer={"block_elements": 256}
    )
    made = make_write_plan(saved_tensors(plan_of(config), state_format(config)), [0, 0, 0, 0])
    written = made.written_bytes()
    assert max(written.values()) / (sum(written.values()) / 4) < 1.02


def test_a_file_of_weights_belongs_to_one_node_where_one_has_it_all() -> None:
    config = make_config(parallel={"data": 4, "pipeline": 2})
    nodes = [0, 0, 1, 1, 2, 2, 3, 3]
    tensors = saved_tensors(plan_of(config), state_format(config))
    made = make_write_plan(tensors, nodes)
    _check(made, tensors, nodes)
    weights = [file for file in made.files if file.name.startswith("model-")]
    assert {nodes[file.lead] for file in weights} == {0, 1, 2, 3}


def test_pieces_grow_so_that_a_manifest_stays_small() -> None:
    assert write_plan.piece_bytes_for(1) == 8 << 20
    assert write_plan.piece_bytes_for((8 << 20) << 18) == 8 << 20
    assert write_plan.piece_bytes_for(((8 << 20) << 18) + 1) == 16 << 20
    assert write_plan.piece_bytes_for(16 * 10**12) == 64 << 20


def test_large_weights_start_new_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_plan, "LARGEST_FILE_BYTES", 1000)
    tensors = [
        SavedTensor(f"w{i}", "weight", "F32", (10, 10), (HeldBox(Box.whole((10, 10)), (0,)),), True)
        for i in range(5)
    ]
    made = make_write_plan(tensors, [0])
    assert [len(file.tensors) for file in made.files] == [2, 2, 1]
    assert made.files[0].name == "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([((0, 0), (1, 4))], "no rank holds"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], "overlap"),
        ([((0, 0), (3, 4))], "outside"),
    ],
)
def test_parts_that_are_not_the_tensor_are_refused(
    parts: list[tuple[tuple[int, ...], tuple[int, ...]]], message: str
) -> None:
    boxes = tuple(HeldBox(Box(start, stop), (0,)) for start, stop in parts)
    with pytest.raises(LayoutError, match=message):
        make_write_plan([SavedTensor("w", "weight", "F32", (2, 4), boxes, True)], [0])


def test_what_a_rank_wants_is_what_its_parameters_and_blocks_are() -> None:
    config = make_config(
        model={"heads": 4, "kv_heads": 4, "tie_embeddings": True},
        parallel={"tensor": 2, "data": 2, "pipeline": 3},
        train={"precision": "bf16"},
    )
    plan = plan_of(config)
    parameters, owned = parameter_layout(plan), optimizer_layout(plan)
    for rank in range(config.parallel.ranks):
        wanted = wanted_boxes(plan, rank, state_format(config))
        weights = {n: set(b) for n, b in wanted.items() if n.startswith(("model.", "lm_head"))}
        assert weights == {n: set(b) for n, b in parameters.holdings[rank].items()}
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            mine = {
                n.removeprefix(f"{kind}."): sum(box.elements for box in b)
                for n, b in wanted.items()
                if n.startswith(f"{kind}.")
            }
            assert mine == {
                n: sum(box.elements for box in b) for n, b in owned.holdings[rank].items()
            }
