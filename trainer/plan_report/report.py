"""The report of `holdfast plan` on a configuration, for people and for programs. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from holdfast.parallel.errors import counted, printable, size_text
from holdfast.parallel.layout import LayerSpec
from holdfast.parallel.optimizer import StateFormat
from holdfast.parallel.plan import (
    Plan,
    RankMemory,
    peak_activation_bytes,
    rank_memory,
    replica_timeline,
    step_time_s,
    training_program,
)
from holdfast.parallel.schedules import Timeline, draw, legend
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import Coverage
from holdfast.trainer.models import ModelConfig, further_losses_of
from holdfast.trainer.plan_report.losses import ElasticReport, elastic_report
from holdfast.trainer.plan_report.offload import OffloadPlan, offload_plan
from holdfast.trainer.plan_report.strips import StripsPlan, strips_plan
from holdfast.trainer.reports import LayoutTable, step_flops
from holdfast.trainer.run import Throughput, assumed, with_throughput
from holdfast.trainer.step import device_bytes, layers_of_config, plan_of, state_format

_SHOWN_ACTIONS = 24
_CHART_MARGIN = 28
"""The columns of a chart's labels."""
_SUGGESTED_CHUNK = 8192
_MUCH_BYTES = 64 * 2**20
"""The memory of logits from which on a way to save it is named."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """An estimate at some rates."""

    seconds: float
    strips: StripsPlan | None
    """What tensor-parallel layers exchange; None if nothing."""

    def rows(self, config: RunConfig) -> Iterator[tuple[str, str]]:
        """(name, value), for a person."""
        rate = config.train.global_batch * config.train.seq_len / self.seconds
        yield "step time", f"{self.seconds:.4g} s, {rate:,.0f} tokens/s (estimated)"
        if self.strips is not None:
            yield "tensor strips", self.strips.text


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The plan of a configuration and its estimates."""

    config: RunConfig
    plan: Plan
    timeline: Timeline
    """The timeline of the replica with the most micro-batches."""
    memory: tuple[RankMemory, ...]
    """The fullest rank of each pipeline stage."""
    parameters: int
    step_flops: float
    step_time: StepTime | None
    """The estimated time of a step; None without rates."""
    checkpoint_bytes: int
    checkpoint_imbalance: float
    """The bytes of the rank that owns, and so writes, most optimizer state, over the mean."""
    elastic: ElasticReport | None
    """Given if `elastic.enabled`, or if a loss was asked about."""
    offload: OffloadPlan | None
    """Given if activations are offloaded."""
    data: Coverage | None = None
    """Given if the data is known."""

    @property
    def rewind_bytes(self) -> int:
        """The host memory of the steps that a rank can take back, at most, with its shadows'."""
        elastic, form = self.config.elastic, state_format(self.config)
        copies = 1 + (elastic.redundancy if elastic.enabled else 0)
        return max(_owned(self.plan)) * form.held_bytes * copies * elastic.rewind

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values: the same facts as `renderable`."""
        plan = self.plan
        return {
            "mesh": {axis: plan.configured_mesh[axis] for axis in plan.configured_mesh.in_use},
            "schedule": plan.schedule,
            "virtual": plan.virtual,
            "expert_ranks": plan.expert_ranks,
            "parameters": self.parameters,
            "model": msgspec.to_builtins(self.config.model),
            "data": None if self.data is None else self.data.as_dict(),
            "step_flops": self.step_flops,
            "bubble": self.timeline.bubble,
            "step_s": None if self.step_time is None else self.step_time.seconds,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_imbalance": self.checkpoint_imbalance,
            "rewind_bytes": self.rewind_bytes,
            "elastic": None if self.elastic is None else self.elastic.as_dict(),
            "offload": None if self.offload is None else self.offload.as_dict(),
            "recompute": [layer.recompute for layer in plan.layers],
            "recompute_for": assumed(self.config),
            "micro_batches": [list(numbers) for numbers in plan.micro_batches],
            "chunks": [
                {
                    "chunk": chunk,
                    "pipeline": plan.placement[chunk],
                    "layers": [plan.layers[layer].name for layer in plan.layers_of(chunk)],
                }
                for chunk in range(len(plan.placement))
            ],
            "memory_by_stage": [
                asdict(memory) | {"total": memory.total, "stage": stage}
                for stage, memory in enumerate(self.memory)
            ],
            "programs": {
                str(rank): " ".join(map(str, training_program(plan, rank)))
                for rank in self.timeline.spans
            },
        }

    def renderable(self, width: int = 100) -> RenderableType:
        """Tables and charts for a terminal of `width` columns."""
        config, plan = self.config, self.plan
        mesh = plan.configured_mesh
        facts = Table.grid(padding=(0, 2))
        for name, value in (
            ("model", _model_text(config.model)),
            ("parameters", f"{self.parameters:,}"),
            ("ranks", f"{mesh.text} = {mesh.size}"),
            *([("experts", _experts_text(plan))] if plan.spreads_experts else []),
            ("step", f"{config.train.global_batch} sequences of {config.train.seq_len} tokens"),
            ("operations", f"{self.step_flops:.3g} floating-point operations a step"),
            (
                "schedule",
                f"{plan.schedule}, {counted(plan.virtual, 'chunk')} per rank"
                + (f", sequences in {plan.stretches} stretches" if plan.stretches > 1 else ""),
            ),
            ("bubble", f"{self.timeline.bubble:.1%} of the busiest rank's work (simulated)"),
            (
                "checkpoint",
                f"{size_text(self.checkpoint_bytes)}; the rank that writes most writes "
                f"{self.checkpoint_imbalance:.2f} times the mean",
            ),
        ):
            facts.add_row(Text(name, style="dim"), value)
        if self.data is not None:
            facts.add_row(Text("data", style="dim"), Text(printable(self.data.line())))
        if logits := _logits_text(config, plan.layers[-1]):
            facts.add_row(Text("logits", style="dim"), logits)
        if config.elastic.rewind:
            kept = f"the last {counted(config.elastic.rewind, 'step')} can be taken back: about "
            kept += f"{size_text(self.rewind_bytes)} of host memory on the fullest rank"
            facts.add_row(Text("rewind", style="dim"), kept)
        if rates := assumed(config):
            facts.add_row(Text("recompute for", style="dim"), rates)
        if self.step_time is not None:
            for name, value in self.step_time.rows(config):
                facts.add_row(Text(name, style="dim"), value)
        return Group(
            facts,
            Text(""),
            LayoutTable(plan),
            Text(""),
            self._memory_table(),
            Text(""),
            *(() if self.offload is None else (self.offload.renderable(), Text(""))),
            *(() if self.elastic is None else (self.elastic.renderable(), Text(""))),
            Text("one step of the pipeline, simulated", style="bold"),
            Text(
                draw(self.timeline, width=max(30, width - _CHART_MARGIN), summary=False),
                no_wrap=True,
                end="",
            ),
            Text(legend(self.timeline), style="dim"),
            Text(""),
            Text("program of each pipeline rank, first actions", style="bold"),
            *self._programs(),
        )

    def _memory_table(self) -> Table:
        table = Table(title="memory of the fullest rank of each stage, MiB", title_justify="left")
        kinds = ("parameters", "gradients", "optimizer", "activations", "buffers", "total")
        for column in ("stage", *kinds):
            table.add_column(column, justify="right")
        for stage, memory in enumerate(self.memory):
            numbers = [getattr(memory, kind) for kind in kinds]
            table.add_row(str(stage), *(f"{number / 2**20:,.1f}" for number in numbers))
        return table

    def _programs(self) -> list[Text]:
        lines = []
        for rank in self.timeline.spans:
            program = training_program(self.plan, rank)
            shown = " ".join(map(str, program[:_SHOWN_ACTIONS]))
            rest = (
                f" … {len(program) - _SHOWN_ACTIONS} more" if len(program) > _SHOWN_ACTIONS else ""
            )
            lines.append(Text(f"rank {rank}: {shown}{rest}", no_wrap=False))
        return lines


def _experts_text(plan: Plan) -> str:
    """The spread of experts, e.g. "16 over 8 ranks, 2 each; 8 replicas work together"."""
    layers = range(len(plan.layers))
    layer = max(layers, key=lambda number: len(plan.hosts(number)))
    stage = plan.stage_of_layer(layer)
    team = plan.teams(stage)[0]
    counts = sorted({len(plan.experts_of(rank, layer)) for rank in plan.team_ranks(stage)[0]})
    each = " or ".join(map(str, counts))
    return (
        f"{len(plan.hosts(layer))} over {plan.expert_ranks} ranks, {each} each; "
        f"{counted(len(team), 'replica')} compute at the same time"
    )


def plan_report(
    config: RunConfig,
    *,
    flops_per_s: float = 0.0,
    link_bytes_per_s: float = 0.0,
    drive_bytes_per_s: float = 0.0,
    ranks_per_node: int = 0,
    lost: Collection[int] = (),
    data: Coverage | None = None,
) -> PlanReport:
    """Plan a configuration and estimate its costs. Pure; starts nothing.

    Args:
        flops_per_s, link_bytes_per_s: the rates at which a rank computes and sends; both together
            give a step time. 0 for the first: train.tflops.
        drive_bytes_per_s: the rate at which a rank writes offloaded activations; 0:
            offload.drive_gbytes.
        ranks_per_node: 0: the value from `elastic.local_nodes`.
        lost: ranks whose loss is planned for as well.
        data: what is known of the run's data.
    Raises:
        ConfigError: `lost` has ranks outside the layout, or leaves too few.
    """
    given = Throughput(flops_per_s / 1e12, drive_bytes_per_s / 1e9)
    config = with_throughput(config, given, instead=True)
    plan = plan_of(config)
    flops_per_s = config.train.tflops * 1e12
    busiest = max(range(plan.configured_mesh.data), key=lambda d: (len(plan.micro_batches[d]), -d))
    exact = config.numerics.reduction == "exact"
    form = state_format(config)
    step_time = None
    if flops_per_s > 0 and link_bytes_per_s > 0:
        step_time = _step_time(config, plan, form, flops_per_s, link_bytes_per_s)
    elastic = None
    if config.elastic.enabled or lost:
        elastic = elastic_report(config, plan, ranks_per_node=ranks_per_node, lost=lost)
    parameters = _parameters(plan)
    state_bytes = form.saved_bytes
    return PlanReport(
        config=config,
        plan=plan,
        timeline=replica_timeline(plan, busiest),
        memory=_fullest_ranks(
            plan,
            busiest,
            form,
            exact=exact,
            owned_bytes=device_bytes(config),
        ),
        parameters=parameters,
        step_flops=step_flops(plan.layers, config.train.global_batch // config.train.micro_batch),
        step_time=step_time,
        checkpoint_bytes=parameters * (form.precision.bytes + state_bytes),
        checkpoint_imbalance=_imbalance(plan),
        elastic=elastic,
        offload=offload_plan(
            config,
            plan,
            flops_per_s=flops_per_s,
            drive_bytes_per_s=config.offload.drive_gbytes * 1e9,
            step_s=None if step_time is None else step_time.seconds,
        ),
        data=data,
    )


def _step_time(
    config: RunConfig, plan: Plan, form: StateFormat, flops_per_s: float, link_bytes_per_s: float
) -> StepTime:
    seconds = step_time_s(
        plan,
        precision=form.precision,
        exact=config.numerics.reduction == "exact",
        flops_per_s=flops_per_s,
        link_bytes_per_s=link_bytes_per_s,
        packing=config.parallel.packing,
        overlap=config.parallel.overlap,
    )
    return StepTime(seconds, strips_plan(config, plan, flops_per_s, link_bytes_per_s))


def _model_text(model: ModelConfig) -> str:
    """The sizes of a model, those that were not given included."""
    further = further_losses_of(model)
    more = f" and {further} for further tokens" if further else ""
    return (
        f"{model.family}: {counted(model.layers, 'layer')}{more}, hidden {model.hidden}, "
        f"{counted(model.heads, 'head')} of {model.dim_per_head} ({model.kv_heads} for keys and "
        f"values), MLP {model.intermediate}, vocabulary {model.vocab}"
    )


def _logits_text(config: RunConfig, head: LayerSpec) -> str:
    """What chunks of the vocabulary save, or would save; empty where it is little."""

    def head_bytes(chunk: int) -> int:
        train = msgspec.structs.replace(config.train, vocab_chunk=chunk, recompute="none")
        changed = msgspec.structs.replace(config, train=train)
        return layers_of_config(changed)[-1].activation_bytes

    chunk = head.vocab_chunk or _SUGGESTED_CHUNK
    saved = head_bytes(0) - head_bytes(chunk)
    less = f"{size_text(saved)} less for each micro-batch"
    if head.vocab_chunk:
        return f"by chunks of {chunk} vocabulary entries: {less}"
    return f"train.vocab_chunk = {chunk} would keep {less}" if saved >= _MUCH_BYTES else ""


def _fullest_ranks(
    plan: Plan, busiest: int, form: StateFormat, *, exact: bool, owned_bytes: int
) -> tuple[RankMemory, ...]:
    """The memory of the fullest rank of each stage.

    Args:
        busiest: the replica with the most micro-batches, considered beside the first and the last.
        owned_bytes: as for `rank_memory`.
    """
    mesh = plan.configured_mesh

    def of_replica(data: int, stage: int) -> Iterator[RankMemory]:
        activations = peak_activation_bytes(plan, mesh.rank(0, data, stage))
        for shard in range(mesh.shards):
            yield rank_memory(
                plan,
                mesh.rank(shard, data, stage),
                precision=form.precision,
                owned_bytes=owned_bytes,
                exact=exact,
                activations=activations,
            )

    return tuple(
        max(
            (memory for d in {0, busiest, mesh.data - 1} for memory in of_replica(d, stage)),
            key=lambda memory: memory.total,
        )
        for stage in range(mesh.pipeline)
    )


def _parameters(plan: Plan) -> int:
    """The number of elements of all logical tensors, each counted once."""
    return sum(
        spec.elements
        for layer in plan.layers
        for index, specs in enumerate(layer.parameters)
        for spec in specs
        if spec.is_first(index)
    )


def _imbalance(plan: Plan) -> float:
    """The elements of the rank that owns most optimizer state, over the mean."""
    owned = _owned(plan)
    return max(owned) * len(owned) / sum(owned)


def _owned(plan: Plan) -> list[int]:
    """Of each rank, the elements of which it owns the optimizer state."""
    owned = [0] * plan.configured_mesh.size
    for blocks, owners in zip(plan.blocks, plan.owners, strict=True):
        for block, owner in zip(blocks, owners, strict=True):
            owned[owner] += block.elements
    return owned
