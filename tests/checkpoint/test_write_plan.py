"""The write plan: every byte is written once, evenly, each file by one node."""

from __future__ import annotations

import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor
from torch.distributed import TCPStore

from holdfast.checkpoint.format.files import ELEMENT_BYTES
from holdfast.checkpoint.format.plan_types import HeldBox, PlannedPiece, SavedTensor, WritePlan
from holdfast.checkpoint.saving import write_plan
from holdfast.checkpoint.saving.column_join import join_pieces
from holdfast.checkpoint.saving.snapshot import Snapshot
from holdfast.checkpoint.saving.write_plan import make_write_plan
from holdfast.parallel.comm import separate_group
from holdfast.parallel.errors import LayoutError
from holdfast.parallel.layout import without
from holdfast.parallel.layout.boxes import Box
from holdfast.parallel.plan.admission import next_plan
from holdfast.parallel.plan.replan import Roster
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
    optimizer=st.sampled_from(["adamw", "muon"]),
)
def test_every_byte_is_written_once_by_a_rank_that_has_it(
    layout: tuple[int, int, int], ranks_per_node: int, precision: str, tie: bool, optimizer: str
) -> None:
    tensor, data, pipeline = layout
    config = make_config(
        model={"tie_embeddings": tie, "heads": 4, "kv_heads": 4},
        parallel={"tensor": tensor, "data": data, "pipeline": pipeline},
        train={"precision": precision},
        optimizer={"name": optimizer},
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


@settings(max_examples=6, deadline=None)
@given(
    lost=st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=3),
    from_shadows=st.booleans(),
    optimizer=st.sampled_from(["adamw", "muon"]),
)
@example(lost=[{0, 5}], from_shadows=False, optimizer="adamw")
@example(lost=[{0, 5}], from_shadows=True, optimizer="adamw")
@example(lost=[{0, 5}], from_shadows=True, optimizer="muon")
def test_columns_are_joined_whole_from_one_replica_whatever_ranks_it_has(
    lost: list[set[int]], from_shadows: bool, optimizer: str
) -> None:
    config = make_config(
        model={"heads": 4, "kv_heads": 4},
        parallel={"tensor": 2, "data": 2, "pipeline": 2},
        optimizer={"name": optimizer},
    )
    nodes = {rank: f"node-{rank // 4}" for rank in range(8)}
    plan, generation = plan_of(config), 0
    for ranks in lost:
        left = tuple(rank for rank in range(8) if rank not in ranks)
        for present, fresh in ((left, ()), (range(8), ranks), (range(8), ())):
            generation += 1
            roster = Roster(tuple(present), nodes, frozenset(fresh))
            plan = next_plan(plan, roster, filled=True, generation=generation, redundancy=1)
    tensors = saved_tensors(plan, state_format(config), from_shadows=from_shadows)
    made = make_write_plan(tensors, [rank // 4 for rank in range(8)])
    joined = [piece for file in made.files for piece in file.pieces if piece.sources]
    assert joined
    for piece in joined:
        boxes = [part.box for part in piece.sources]
        assert sum(box.elements for box in boxes) == piece.box.elements
        assert not without([piece.box], sorted(boxes, key=lambda box: box.start))
        ranks_of = [rank for part in piece.sources for rank in part.holders]
        assert piece.writer in ranks_of
        if not from_shadows:
            places = [plan.stage_replicas.find(rank) for rank in ranks_of]
            assert len({(at.data, at.pipeline) for at in places if at is not None}) == 1
            assert [plan.stage_replicas.shard_index(rank) for rank in ranks_of] == [0, 1]


def _join(rank: int, pieces: list[PlannedPiece], address: tuple[str, int]) -> dict[int, Tensor]:
    """Join the pieces as a rank of real connections; returns what it wrote, by offset."""
    written: dict[int, Tensor] = {}

    class Written:
        def write_now(self, whole: Tensor, file: str, offset: int) -> int:
            written[offset] = whole.clone()
            return 0

    group = separate_group(
        TCPStore(*address, wait_for_workers=False),
        "127.0.0.1",
        "join",
        range(4),
        rank,
        timeout_s=30,
    )
    values = torch.arange(64 * 64, dtype=torch.float32).view(64, 64)
    mine = [piece for piece in pieces if any(rank in part.holders for part in piece.sources)]
    join_pieces(mine, rank, lambda name, box: values[box.slices], group, cast(Snapshot, Written()))
    return written


def test_pieces_are_joined_from_parts_wherever_they_lie() -> None:
    rng = random.Random(5)
    pieces = []
    for number in range(64):
        parts = [
            HeldBox(Box((number, start), (number + 1, start + 16)), (rng.randrange(4),))
            for start in range(0, 64, 16)
        ]
        writer = rng.choice(parts).holders[0]
        box = Box((number, 0), (number + 1, 64))
        pieces.append(PlannedPiece("weight", box, "file", number, 256, writer, tuple(parts)))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(4) as ranks:
        found = [
            rows
            for rank in [
                ranks.submit(_join, rank, pieces, ("127.0.0.1", store.port)) for rank in range(4)
            ]
            for rows in rank.result(timeout=60).items()
        ]
    joined = torch.cat([row for _, row in sorted(found, key=lambda item: item[0])])
    assert joined.tolist() == torch.arange(64 * 64.0).view(64, 64).tolist()
