"""The configuration as typed values: the sections of no other folder, and the whole.

`RunConfig` holds all sections. Keys are a contract (docs/configuration.md): added, never renamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from holdfast.checkpoint.format import scheme_of
from holdfast.parallel.layout import AXES, Mesh
from holdfast.parallel.schedules import FaultKind, StepPhase
from holdfast.trainer.config.data_section import DataConfig
from holdfast.trainer.config.optimizer_section import OptimizerConfig
from holdfast.trainer.learning_rates import learning_rate
from holdfast.trainer.models import ModelConfig


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the TOML file; unknown keys are errors."""


class BatchStage(Section, frozen=True):
    """The first steps of a run with a smaller batch: a `[[train.batch_ramp]]` table."""

    until: int
    """The steps that are done when it ends."""
    global_batch: int
    """Sequences per step before that."""


class LengthStage(Section, frozen=True):
    """The first steps of a run with shorter sequences: a `[[train.length_ramp]]` table."""

    until: int
    """The steps that are done when it ends."""
    seq_len: int
    """The tokens that attention sees at most before that."""


class TrainConfig(Section, frozen=True):
    """The length of the training, and the computation of a micro-batch. A field for each key."""

    steps: int = 100
    stop_after: int = 0
    """Save and end after this step, with the learning rates of `steps` steps; 0: never."""
    seq_len: int = 128
    global_batch: int = 16
    """Sequences per step, over all replicas; never changes with the number of ranks."""
    batch_ramp: list[BatchStage] = []
    """Smaller batches of the first steps: [[train.batch_ramp]] tables."""
    length_ramp: list[LengthStage] = []
    """Shorter sequences in the first steps, as many as fill `seq_len`: [[train.length_ramp]]
    tables."""
    micro_batch: int = 2
    seed: int = 1234
    precision: str = "fp32"
    """A name of `PRECISIONS`; bf16 has fp32 master weights, `holdfast check` computes in fp64."""
    clip_grad_norm: float = 1.0
    """0: no clipping."""
    z_loss_coef: float = 0.0
    """The factor of the mean square of each token's logarithm of the sum of exponentials."""
    recompute: Literal["none", "full", "selective", "auto"] = "none"
    """"selective": recompute the attention core; "full": whole layers; "auto": the least per layer
    that keeps activations within `activation_gib`."""
    activation_gib: float = 0.0
    """With recompute = "auto", the memory for activations on a rank."""
    tflops: float = 0.0
    """The compute rate of a rank in 10^12 operations a second, for "auto" beside offload; 0:
    measured."""
    vocab_chunk: int = 0
    """The vocabulary entries whose logits a rank has in memory at once; 0: all. It is one of the
    keys that fix the bits."""
    context_chunks: int = 1
    """The slices of a sequence, each computed as one. It is one of the keys that fix the bits."""
    compile: bool = False
    """The model's elementwise parts, norms and attention are compiled when training begins. It is
    one of the keys that fix the bits."""
    threads_per_rank: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_every: int = 0
    """Steps between evaluations on held-out data; 0: none."""
    eval_batches: int = 8
    """Global batches per evaluation."""

    def batch_of(self, step: int) -> int:
        """The sequences of a step, counted from 0. Pure."""
        found = (stage.global_batch for stage in self.batch_ramp if step < stage.until)
        return next(found, self.global_batch)

    def length_of(self, step: int) -> int:
        """The tokens of a sequence of a step, counted from 0. Pure."""
        found = (stage.seq_len for stage in self.length_ramp if step < stage.until)
        return next(found, self.seq_len)

    def samples_before(self, step: int) -> int:
        """The sequences of all steps before one, counted from 0. Pure."""
        begun = found = 0
        for stage in self.batch_ramp:
            found += (max(begun, min(step, stage.until)) - begun) * stage.global_batch
            begun = max(begun, min(step, stage.until))
        return found + (step - begun) * self.global_batch


def ramp_problems(train: TrainConfig, replicas: int) -> Iterator[str]:
    """The broken rules of stages in which batches or sequences grow, one line each. Pure."""
    last = 0
    unit = train.micro_batch * replicas
    for number, stage in enumerate(train.batch_ramp):
        name, size = f"train.batch_ramp[{number}]", stage.global_batch
        yield from _end_problems(name, stage.until, last)
        last = max(last, stage.until)
        if size > train.global_batch:
            yield (
                f"{name}.global_batch = {size}: must be at most train.global_batch = "
                f"{train.global_batch}"
            )
        if unit >= 1 and size >= 1 and size % unit:
            yield (
                f"{name}.global_batch = {size}: must be a multiple of train.micro_batch x "
                f"parallel.data = {unit}"
            )
    last = longest = 0
    for number, of_length in enumerate(train.length_ramp):
        name, length = f"train.length_ramp[{number}]", of_length.seq_len
        yield from _end_problems(name, of_length.until, last)
        last = max(last, of_length.until)
        if not longest < length < train.seq_len:
            yield (
                f"{name}.seq_len = {length}: must be more than {longest}, where the last was, and "
                f"less than train.seq_len = {train.seq_len}"
            )
        longest = max(longest, length)


def _end_problems(name: str, until: int, last: int) -> Iterator[str]:
    if 1 <= until <= last:
        yield f"{name}.until = {until}: must be more than {last}, where the last ends"


class NumericsConfig(Section, frozen=True):
    """The summation of gradients, and the steps that are left out."""

    reduction: Literal["exact", "fast"] = "exact"
    fraction_bits: int = 44
    nonfinite: Literal["error", "skip"] = "error"
    nonfinite_limit: int = 10
    """Steps skipped in a row that end the run; 0: none do."""
    spike_window: int = 0
    """The steps before with which a step's loss and gradient norm are compared, to leave it out if
    they stand out; 0: no step is left out for that."""
    spike_sigmas: float = 6.0
    """The standard deviations above the mean of these steps that make a step a spike."""
    spike_action: Literal["skip", "rewind"] = "skip"
    """What is done about a spike: the step is left out ("skip"), or the samples that cause it are
    searched for, and the run goes back and on without them ("rewind")."""
    spike_limit: int = 10
    """Steps skipped in a row of which the last is a spike, that end the run; 0: none do."""
    tensor_shards: int = 1
    """The parts of each layer's matrices, whose partial sums are added in one order for any tensor
    degree that divides them; 1: as many as tensor ranks, in their order."""
    tensor_strips: int = 1
    """The strips of a slice's tokens in which layers are computed, so that tensor ranks send some
    while they compute others; 1: all of them at once."""


class ParallelConfig(Section, frozen=True):
    """The layout: a key for each axis of the mesh (`AXES`), the cut and order of the work, and how
    ranks exchange gradients and parameters. A field for each key."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    """The ranks of a stage over which the experts of a layer are spread."""
    expert_replicas: int | Literal["auto"] = 1
    """The copies of each expert on these ranks; "auto": as their loads ask for, in an elastic run.
    Results do not depend on it."""
    expert_slots: int = 0
    """With expert_replicas = "auto": the experts of a layer that a rank has at most; 0: twice as
    many as with one copy of each."""
    context_exchange: Literal["auto", "heads", "keys", "ring"] = "auto"
    """With context > 1: slices travel for heads ("heads"), or keys and values do, all at once
    ("keys") or those of one rank at a time ("ring": fast mode only); "auto": heads where their
    number on a rank divides, else keys, or in fast mode the ring. In exact mode results do not
    depend on it."""
    strips_per_message: int = 1
    """With numerics.tensor_strips: those that tensor ranks send together, at most. Results do not
    depend on it."""
    virtual: int = 1
    """Model chunks per pipeline rank."""
    schedule: str = "1f1b"
    """A name of `SCHEDULES` (parallel/schedules)."""
    stretches: int = 1
    """The equal parts of each sequence, of whole slices (`train.context_chunks`), that pass the
    pipeline one after another: a smaller bubble and fewer activations. Results do not depend on
    it."""
    sequence_parallel: bool = True
    """With tensor > 1: hidden states are split along the sequence between layers."""
    backend: Literal["auto", "gloo", "nccl", "mpi"] = "auto"
    blocks_per_chunk: list[int] = []
    """Transformer layers of each model chunk, in forward order; empty: an even split."""
    micro_batch_order: str = "ascending"
    """A name of `MICRO_BATCH_ORDERS` (parallel/plan); results do not depend on it."""
    shard: Literal["optimizer", "gradients", "parameters"] = "optimizer"
    """What the replicas of a stage share instead of keeping it each."""
    shard_group: int = 0
    """The replicas over which that is done, at least; 0: all."""
    overlap: bool = True
    """Gradients and parameters travel beside computation; results do not depend on it."""
    bucket_elements: int = 1048576
    """The size up to which neighbouring blocks travel as one message."""
    packing: bool = True
    """Exact mode: integer sums are packed on the wire; results do not depend on it."""
    reduce_dtype: Literal["auto", "bf16"] = "auto"
    """Fast mode: the type of gradient sums on the wire; "auto": that in which they are added."""

    @property
    def mesh(self) -> Mesh:
        """The mesh of these sizes, which are not checked here."""
        return Mesh(tuple(AXES.values()), tuple(getattr(self, axis) for axis in AXES))

    @property
    def ranks(self) -> int:
        """The number of workers in this layout."""
        return self.mesh.size


class CheckpointConfig(Section, frozen=True):
    """When state is saved, and where. The last step is always saved. A field for each key."""

    every: int = 0
    """Steps between checkpoints on the local disk; 0: only at the end."""
    every_seconds: float = 0.0
    """Seconds without a checkpoint after which one is made; 0: by steps alone."""
    keep: int = 3
    """The number of checkpoints that stay; 0: all."""
    keep_best: int = 0
    """The number of checkpoints that stay beside these, because their losses are the lowest."""
    best_by: str = ""
    """The validation set whose losses count for that; empty: the first, which is what is held
    out."""
    path: str = ""
    """The folder of the checkpoints, RUN/checkpoints by default; a URL (s3://…) is a second
    tier."""
    policy: Literal["wait", "skip"] = "wait"
    """The action when a save is due while the last one is still being written."""
    verify: bool = True
    """Whether checksums are checked on loading."""
    memory_every: int = 0
    """Steps between copies in shared memory, which survive a worker's crash; 0: none."""
    memory_keep: int = 1
    remote_every: int = 1
    """With a URL, upload one of this many local checkpoints."""
    remote_keep: int = 0
    """The number of checkpoints that stay at the URL; 0: all."""
    arena_mib: int = 0
    """Host memory of a rank between state and disk; 0: its part of a checkpoint, at most 2048."""
    timeout_s: float = 600.0
    """The time after which a save is given up."""
    retry_s: float = 30.0
    """The time for which the save of the last step is tried again when it fails."""
    exit_s: float = 60.0
    """The time that a run may take after SIGTERM to finish its step and save it."""

    @property
    def url(self) -> str:
        """The URL of the remote tier; empty if there is none."""
        return self.path if scheme_of(self.path) else ""


class OffloadConfig(Section, frozen=True):
    """Where activations wait for their backward pass."""

    activations: Literal["none", "ssd", "host"] = "none"
    """"ssd": on a drive; "host": in pinned host memory, for models on a GPU."""
    path: str = ""
    """The folder on the drive; empty: that of temporary files (TMPDIR)."""
    limit_gib: float = 0.0
    """The most that a rank has away at once; 0: no limit but the drive's room."""
    least_share: float = 0.0
    """The least and the most share of the eligible activations that is sent; equal values fix
    it."""
    most_share: float = 1.0
    smallest_kib: int = 256
    """Smaller tensors stay in memory."""
    limit_mib_per_s: float = 0.0
    """The highest rate at which a rank writes and reads; 0: no limit."""
    staging_mib: int = 1024
    """Pinned host memory of a rank between a GPU and the drive."""
    compact_heap: bool = True
    """On a CPU, restart with glibc settings that return freed memory to the system."""
    drive_gbytes: float = 0.0
    """The rate of a rank's drive in 10^9 bytes a second, for train.recompute = "auto"; 0:
    measured."""
    drive_tbw: float = 0.0
    """The rated endurance of the drive, in terabytes written; 0: unknown."""


class ChaosConfig(Section, frozen=True):
    """A fault that a run causes on purpose; see `holdfast.elastic.faults.Fault`."""

    fault: FaultKind
    rank: int
    step: int
    phase: StepPhase = "compute"
    seconds: float = 60.0
    factor: float = 3.0
    incarnation: int = 0


class ElasticConfig(Section, frozen=True):
    """The reaction to ranks that are lost or come back. A field for each key."""

    enabled: bool = False
    redundancy: int = 1
    shadow_memory: Literal["auto", "device", "host"] = "auto"
    """The place of the shadows' copies; auto: host memory beside a GPU."""
    min_ranks: int = 1
    heartbeat_ms: int = 100
    heartbeat_timeout_ms: int = 3000
    hang_timeout_s: float = 10.0
    startup_grace_s: float = 120.0
    """How long a rank may keep others waiting before two of its steps are known, and how long it
    may build, prepare a change, read data or evaluate a batch."""
    apart_s: float = 150.0
    """Seconds without a part in the run after which a node ends."""
    respawn: bool = True
    verify_every: int = 100
    claims: bool = False
    """Whether each rank claims its next micro-batch when it is free, so that a slow one computes
    fewer; else the plan divides them."""
    rewind: int = 0
    """The last steps that can be taken back from host memory; 0: none."""
    audit_every: int = 0
    """Steps between those in which a micro-batch is computed by two ranks and compared; 0: none."""
    local_nodes: int = 1
    lighthouse: str = ""
    health: Literal["off", "start"] = "off"
    """"start": each node is looked at before it takes part, and a sick one is refused."""
    activation_headroom: float = 0.3
    """The share by which activation memory may exceed the fullest rank's after a loss, to idle
    less."""
    rank_memory_gib: float = 0.0
    """The memory that a rank of a smaller stage replica may use; 0: its GPU's, or an equal share of
    its machine's."""
    expert_inputs_gib: float = 4.0
    """The host memory in which a rank keeps what its tokens bring to experts, for the length of a
    step; 0: none."""
    expert_steps: int = 20
    """With parallel.expert_replicas = "auto": the steps in a row whose loads ask for other copies
    of experts, before these move."""
    straggler_every: int = 10
    """Steps between two comparisons of all ranks' own times, and of their messages; 0: never."""
    straggler_factor: float = 2.0
    """A rank is reported as slow if its own time is twice in a row this many times the usual."""
    slow_ranks: Literal["report", "relieve"] = "report"
    """What follows for ranks that compute slowly: "relieve": micro-batches are divided by measured
    speeds, once that saves more than the change costs."""
    slow_link_factor: float = 1.5
    """A link is reported as slow if its messages take twice in a row, and when it is tried alone,
    this many times as long as usual."""
    chaos: list[ChaosConfig] = []
    """Faults on purpose, to try what a run survives: [[elastic.chaos]] tables."""


class LogConfig(Section, frozen=True):
    """The reports of a run."""

    every: int = 1
    """Steps between progress lines; metrics.jsonl has every step."""
    tensorboard: bool = True
    trace_steps: list[int] = []
    """Steps, counted from 1, whose actions are written for Perfetto."""
    norms_every: int = 0
    """Steps between those whose norms of gradients and parameters, and sizes of outputs, are noted
    by layer; 0: none."""

    operation_steps: list[int] = []
    """Steps, counted from 1, whose operations are written with digests of their results."""
    operation_values: list[int] = []
    """Operations of these steps, by number, whose inputs and results are written whole."""
    digests_every: int = 1
    """Steps between lines of digests.jsonl, by which runs are compared bit by bit; 0: none."""

    def has_digests(self, step: int) -> bool:
        """Whether a step, counted from 0, has such a line. Pure."""
        return bool(self.digests_every) and (step + 1) % self.digests_every == 0

    def has_norms(self, step: int) -> bool:
        """Whether a step, counted from 0, is one of these. Pure."""
        return bool(self.norms_every) and (step + 1) % self.norms_every == 0


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a run depends on; a pure value."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    numerics: NumericsConfig = NumericsConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    offload: OffloadConfig = OffloadConfig()
    elastic: ElasticConfig = ElasticConfig()
    log: LogConfig = LogConfig()

    def rate_of(self, step: int) -> float:
        """The learning rate of a step, counted from 0. Pure."""
        return learning_rate(step, steps=self.train.steps, stages=self.optimizer.all_stages)

    @property
    def tensor_parts(self) -> int:
        """The parts of each layer's matrices: those of the tensor ranks, or shards."""
        return max(self.parallel.tensor, self.numerics.tensor_shards)

    @property
    def tensor_parts_key(self) -> str:
        """The key that says how many parts there are."""
        return "parallel.tensor" if self.numerics.tensor_shards == 1 else "numerics.tensor_shards"

    @property
    def mesh(self) -> Mesh:
        """The mesh of the layout, with the parts of the parameters."""
        mesh = self.parallel.mesh
        return Mesh(
            mesh.axes,
            mesh.sizes,
            self.numerics.tensor_shards,
            self.train.context_chunks // max(1, self.parallel.stretches),
            self.parallel.sequence_parallel and self.tensor_parts > 1,
        )
