"""`holdfast plan` on shadows and losses: its figures are those of the objects that a run makes."""

from __future__ import annotations

import msgspec
import pytest
import torch

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout.boxes import Box
from holdfast.parallel.optimizer import ParameterGroups
from holdfast.parallel.optimizer.exchange.followers import follower_routes
from holdfast.parallel.optimizer.shadow_state import ShadowState
from holdfast.parallel.plan.block_transfers import held_blocks
from holdfast.parallel.plan.plan import Plan, block_box
from holdfast.parallel.plan.replan import Roster, with_shadows
from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.config.sections import ParallelConfig
from holdfast.trainer.plan_report.losses import elastic_report
from holdfast.trainer.plan_report.report import plan_report
from holdfast.trainer.step.planning import plan_of
from holdfast.trainer.step.saved_tensors import saved_tensors, state_format


def config(
    redundancy: int, nodes: int = 2, *, precision: str = "fp32", shadow_memory: str = "auto"
) -> RunConfig:
    return convert_config(
        {
            "model": {
                **{"family": "llama", "layers": 4, "hidden": 48, "intermediate": 96},
                **{"heads": 4, "vocab": 320},
            },
            "train": {"seq_len": 16, "global_batch": 8, "micro_batch": 1, "precision": precision},
            "parallel": {"pipeline": 2, "data": 2, "virtual": 2, "schedule": "interleaved-1f1b"},
            "optimizer": {"block_elements": 2048},
            "elastic": {
                **{"enabled": True, "redundancy": redundancy, "local_nodes": nodes},
                "shadow_memory": shadow_memory,
            },
        }
    )


def shadowed_plan(redundancy: int) -> Plan:
    plan = plan_of(config(redundancy))
    return with_shadows(
        plan, Roster((0, 1, 2, 3), {r: f"node{r // 2}" for r in range(4)}), redundancy
    )


@pytest.mark.parametrize("redundancy", [0, 1, 2])
@pytest.mark.parametrize("memory", ["device", "host"])
def test_memory_and_traffic_are_those_of_the_fullest_rank(redundancy: int, memory: str) -> None:
    given = config(redundancy, precision="bf16", shadow_memory=memory)
    report = elastic_report(given, plan_of(given))
    plan = shadowed_plan(redundancy)
    copies = [
        ShadowState(
            plan,
            rank,
            device=torch.device("cpu"),
            form=state_format(given),
            groups=ParameterGroups.of(state_format(given).rule, given.optimizer),
            bucket_elements=5000,
            in_host_memory=memory == "host",
        ).copies.bytes
        for rank in range(4)
    ]
    sent = [
        sum(
            4 * (span.stop - span.start)
            for pieces in follower_routes(plan, rank, {}, 5000).sends.values()
            for _, spans in pieces
            for span in spans
        )
        for rank in range(4)
    ]
    assert (report.shadow_bytes, report.traffic_bytes) == (max(copies), max(sent))
    assert (report.shadow_bytes > 0) == (redundancy > 0)
    assert report.spared_bytes == 0  # shadows lie in other stages, and get no parameters anyway
    assert report.unsafe_blocks == 0


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("bf16", 0.5)])
def test_a_shadow_that_computes_with_its_blocks_gets_gradients_instead_of_parameters(
    precision: str, share: float
) -> None:
    given = config(1, precision=precision)
    flat = msgspec.structs.replace(given, parallel=ParallelConfig(data=4))
    report = elastic_report(flat, plan_of(flat))
    assert report.spared_bytes == share * report.traffic_bytes > 0


def test_a_loss_moves_what_the_lost_rank_had_and_what_others_get_with_layers() -> None:
    plan = shadowed_plan(1)
    loss = elastic_report(config(1), plan_of(config(1)), lost=[2]).loss
    assert loss is not None
    owned = sum(plan.blocks[i][p].elements for i, p in plan.owned_blocks(2))
    shadowed = sum(
        block.elements
        for block, holders in zip(plan.blocks[0], plan.shadows[0], strict=True)
        if 2 in holders
    )
    living = (0, 1, 3)
    before, after = held_blocks(plan, living), held_blocks(loss.plan, living)
    gotten = [plan.block(key).elements for rank in living for key in after[rank] - before[rank]]
    assert loss.moved_bytes == 12 * sum(gotten) > 12 * (owned + shadowed)
    assert loss.without_copy == 0
    assert 1 < loss.slowdown < 1.5  # three ranks have the work of four
    for stage in range(2):
        replicas = range(loss.plan.stage_replicas.replicas(stage))
        numbers = [m for replica in replicas for m in loss.plan.micro_batches_of(stage, replica)]
        assert sorted(numbers) == list(range(8))


def test_state_without_copies_is_said_to_be_lost() -> None:
    loss = elastic_report(config(0), plan_of(config(0)), lost=[2]).loss
    assert loss is not None
    assert loss.without_copy == len(plan_of(config(0)).owned_blocks(2))
    whole_node = elastic_report(config(1, nodes=1), plan_of(config(1)))
    assert whole_node.unsafe_blocks == sum(map(len, plan_of(config(1)).blocks))


def test_ranks_that_are_not_there_and_too_few_left_are_refused() -> None:
    with pytest.raises(ConfigError, match="--lost 7: the layout has ranks 0 to 3"):
        plan_report(config(1), lost=[7])
    with pytest.raises(ConfigError, match="0 ranks are left"):
        plan_report(config(1), lost=[0, 1, 2, 3])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_saved_from_shadows_is_nobody_elses(precision: str) -> None:
    plan = shadowed_plan(1)
    saved = saved_tensors(plan, state_format(config(1, precision=precision)), from_shadows=True)
    first: dict[tuple[str, Box], int] = {}
    for blocks, shadows in zip(plan.blocks, plan.shadows, strict=True):
        for block, holders in zip(blocks, shadows, strict=True):
            spec = plan.layers[block.layer].parameters[0][block.spec_index]
            first[spec.name, block_box(spec, block)] = holders[0]
    weights = [tensor for tensor in saved if tensor.kind == "weight"]
    assert weights
    assert len(saved) == len(weights) * (4 if precision == "bf16" else 3)
    for tensor in saved:
        name = tensor.name if tensor.kind == "weight" else tensor.name.split(".", 1)[1]
        assert {part.box: part.holders for part in tensor.parts} == {
            box: (rank,) for (owner, box), rank in first.items() if owner == name
        }
