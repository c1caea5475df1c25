"""Which layers are recomputed beside what is offloaded: what fits, and never more than needed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import assume, given, settings, strategies as st

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout.mesh import Mesh
from holdfast.parallel.layout.parameters import LayerSpec
from holdfast.parallel.offload.policy.choice import Rates, choose_layers
from holdfast.parallel.offload.policy.estimate import estimate_offload
from holdfast.parallel.plan.initial import make_plan
from holdfast.parallel.plan.plan import Plan
from holdfast.trainer.models import layer_specs
from holdfast.trainer.models.llama.family import LlamaConfig
from holdfast.trainer.step.planning import WAYS

TFLOPS = 1e12
MIB = 2**20


def ways_of(blocks: int, hidden: int = 1024, seq_len: int = 1024) -> dict[str, tuple]:
    model = LlamaConfig(
        family="llama",
        layers=blocks,
        hidden=hidden,
        intermediate=3 * hidden,
        heads=8,
        kv_heads=8,
        vocab=512,
    )
    return {
        way: layer_specs(
            model,
            tensor=1,
            sequence_parallel=False,
            seq_len=seq_len,
            micro_batch=2,
            precision="bf16",
            recompute=way,
        )
        for way in WAYS
    }


def first_plan(ways: dict[str, tuple], pipeline: int = 1, micro_batches: int = 4) -> Plan:
    return make_plan(
        ways["none"],
        Mesh.of(tensor=1, data=1, pipeline=pipeline),
        virtual=1,
        schedule="1f1b",
        micro_batches=micro_batches,
        block_elements=1 << 20,
    )


def kept(plan: Plan, layers: tuple[LayerSpec, ...], rates: Rates, stage: int = 0) -> int:
    return estimate_offload(
        replace(plan, layers=layers),
        plan.stage_replicas.rank(0, 0, stage),
        most_share=rates.most_share,
        flops_per_s=rates.flops_per_s,
        drive_bytes_per_s=rates.drive_bytes_per_s,
    ).activations


def again(layers: tuple[LayerSpec, ...]) -> float:
    return sum(layer.recompute_flops for layer in layers)


def drive(gbytes: float) -> Rates:
    return Rates(flops_per_s=TFLOPS, drive_bytes_per_s=gbytes * 1e9, most_share=1.0)


budgets = st.floats(0.05, 1.2)
gbytes = st.floats(0.0, 20.0)
known_gbytes = st.floats(0.0, 20.0, exclude_min=True)  # a rate of 0 is one that is not known


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.sampled_from([1, 2, 3]), budgets, gbytes)
def test_what_is_chosen_fits_or_is_refused(
    blocks_per_stage: int, pipeline: int, budget: float, rate: float
) -> None:
    ways = ways_of(blocks_per_stage * pipeline)
    plan = first_plan(ways, pipeline)
    most = budget * kept(plan, ways["none"], Rates())
    least = max(kept(plan, ways["full"], drive(rate), stage) for stage in range(pipeline))
    try:
        chosen = choose_layers(plan, ways, most_bytes=most, rates=drive(rate))
    except ConfigError:
        assert least > most
        return
    assert all(kept(plan, chosen, drive(rate), stage) <= most for stage in range(pipeline))
    assert chosen == choose_layers(plan, ways, most_bytes=most, rates=drive(rate))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), budgets, budgets, known_gbytes, known_gbytes)
def test_more_memory_or_a_faster_drive_never_recomputes_more(
    blocks: int, budget: float, more_budget: float, rate: float, more_rate: float
) -> None:
    budget, more_budget = sorted((budget, more_budget))
    rate, more_rate = sorted((rate, more_rate))
    ways = ways_of(blocks)
    plan = first_plan(ways)
    whole = kept(plan, ways["none"], Rates())
    try:
        scarce = choose_layers(plan, ways, most_bytes=budget * whole, rates=drive(rate))
    except ConfigError:
        return
    ample = choose_layers(plan, ways, most_bytes=more_budget * whole, rates=drive(more_rate))
    assert again(ample) <= again(scarce)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.floats(0.2, 1.0), gbytes)
def test_at_most_one_change_is_more_than_the_least(blocks: int, budget: float, rate: float) -> None:
    ways = ways_of(blocks)
    plan = first_plan(ways)
    most = budget * kept(plan, ways["none"], Rates())
    every = [
        (ways["none"][0], *(ways[way][i + 1] for i, way in enumerate(mix)), ways["none"][-1])
        for mix in product(WAYS, repeat=blocks)
    ]
    fitting = [again(layers) for layers in every if kept(plan, layers, drive(rate)) <= most]
    assume(fitting)
    found = choose_layers(plan, ways, most_bytes=most, rates=drive(rate))
    assert again(found) <= min(fitting) + ways["full"][1].recompute_flops


def test_a_drive_without_limits_takes_everything_and_no_drive_means_recomputing() -> None:
    ways = ways_of(24)
    plan = first_plan(ways)
    most = 0.5 * kept(plan, ways["none"], Rates())
    unlimited = choose_layers(plan, ways, most_bytes=most, rates=drive(1e6))
    assert unlimited == ways["none"]
    alone = choose_layers(plan, ways, most_bytes=most, rates=Rates())
    assert {layer.recompute for layer in alone[1:-1]} == {"selective", "full"}


def test_cheap_operations_are_recomputed_first() -> None:
    ways = ways_of(8)
    plan = first_plan(ways)
    most = kept(plan, ways["none"], Rates()) - MIB
    chosen = choose_layers(plan, ways, most_bytes=most, rates=Rates())
    assert [layer.recompute for layer in chosen].count("selective") == 1
    assert [layer.recompute for layer in chosen].count("full") == 0


def test_the_error_names_what_is_needed() -> None:
    ways = ways_of(4)
    with pytest.raises(
        ConfigError, match=r"train.activation_gib = 0.0009766: pipeline stage 0 keeps"
    ):
        choose_layers(first_plan(ways), ways, most_bytes=MIB, rates=Rates())
