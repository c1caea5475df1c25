"""The rules between keys; one line per broken rule: the key, its value, what to change."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from math import lcm
from typing import TYPE_CHECKING

from holdfast.parallel.errors import ConfigError, ScheduleError, shown
from holdfast.parallel.optimizer import OPTIMIZERS
from holdfast.parallel.schedules import SCHEDULES, check_stretches, placement
from holdfast.trainer.config.choices import choice_problem, registries
from holdfast.trainer.config.data_section import check_data_config, validation_names
from holdfast.trainer.config.extent import extent_problems, parameter_names
from holdfast.trainer.config.installation import elastic_problem
from holdfast.trainer.config.optimizer_section import (
    average_problems,
    group_problems,
    moment_problems,
    stage_problems,
)
from holdfast.trainer.config.ranges import RANGES, range_problems
from holdfast.trainer.config.sections import ramp_problems
from holdfast.trainer.config.texts import place_problems, text_problems
from holdfast.trainer.config.vocabulary import BYTE_VOCAB
from holdfast.trainer.models import clips_heads, family_of, windows_of

if TYPE_CHECKING:
    from holdfast.trainer.config.sections import RunConfig

_ALIGNED = 32
"""The elements of a head in a slice: the matrix products of each head begin at a 64-byte boundary,
wherever it lies."""
_PORT = r"(?:6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_LIGHTHOUSE = re.compile(
    rf"(?:(?:http|holdfast)://)?(?:\[[0-9A-Fa-f:.]+\]|{_LABEL}(?:\.{_LABEL})*\.?):{_PORT}/?"
)


def problems_of(config: RunConfig, world_size: int | None = None) -> list[str]:
    """All broken rules, in the order of the sections; empty for a sound configuration. Pure."""
    unknown = list(_choices(config))
    if unknown:
        return unknown  # the other rules ask the registries what these names stand for
    rules: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
        range_problems,
        text_problems,
        place_problems,
        _model,
        _optimizer,
        _data,
        _best,
        _batch,
        _tensor,
        _tensor_shards,
        _tensor_strips,
        _slices,
        _stretches,
        _pipeline,
        _elastic,
        _rewinding,
        _offload,
        _recompute,
        _exchange,
        _packages,
        _experts,
    )
    problems = [problem for rule in rules for problem in rule(config)]
    if not problems:
        problems = list(extent_problems(config))
    if not problems and config.optimizer.groups:
        problems = list(group_problems(config.optimizer, parameter_names(config)))
    if world_size is not None and world_size != config.parallel.ranks:
        mesh = config.parallel.mesh
        problems.append(
            f"{world_size} workers were started, but {mesh.text} needs {mesh.size}; change "
            f"parallel.data, or start {mesh.size}"
        )
    return problems


def config_notes(config: RunConfig) -> Iterator[str]:
    """One line per setting that is allowed and hardly meant. Pure."""
    warmup, steps = config.optimizer.warmup_steps, config.train.steps
    if warmup > steps:
        yield (
            f"note: optimizer.warmup_steps = {warmup} with train.steps = {steps}: the learning "
            "rate does not reach optimizer.lr"
        )
    for number, stage in enumerate(config.optimizer.lr_stages):
        if stage.start >= steps:
            yield (
                f"note: optimizer.lr_stages[{number}].start = {stage.start} with train.steps = "
                f"{steps}: the stage is not reached"
            )
    for number, stage in enumerate(config.data.stages):
        if stage.start >= steps:
            yield (
                f"note: data.stages[{number}].start = {stage.start} with train.steps = {steps}: "
                "the stage is not reached"
            )
    if config.data.validation and not config.train.eval_every:
        yield (
            "note: data.validation names sets, and train.eval_every = 0: the run evaluates on none"
        )
    saved, evaluated = config.checkpoint.every, config.train.eval_every
    if config.checkpoint.keep_best and saved and evaluated and saved % evaluated:
        yield (
            f"note: checkpoint.every = {saved} is no multiple of train.eval_every = {evaluated}: "
            f"only every {lcm(saved, evaluated)} steps a checkpoint has a loss for keep_best"
        )


def _choices(config: RunConfig) -> Iterator[str]:
    for name, allowed in registries().items():
        section, _, key = name.partition(".")
        if problem := choice_problem(name, getattr(getattr(config, section), key), allowed):
            yield problem


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    family = family_of(model.family)
    tensor = config.parallel.tensor
    parts = config.tensor_parts if tensor >= 1 else tensor
    yield from family.problems(model, parts, config.tensor_parts_key)
    parallel = config.parallel
    if tensor > 1 and family.experts(model) and not parallel.sequence_parallel:
        yield (
            f"parallel.sequence_parallel = false with parallel.tensor = {tensor} and experts: "
            "every rank would send the same tokens; set it to true"
        )
    if config.train.compile and family.compiled_regions is None:
        yield (
            f"train.compile = true: model.family = {model.family!r} has nothing to compile; set it "
            "to false"
        )


def _optimizer(config: RunConfig) -> Iterator[str]:
    rule = OPTIMIZERS[config.optimizer.name]
    yield from rule.problems(config.optimizer)
    yield from stage_problems(config.optimizer)
    yield from moment_problems(config.optimizer)
    yield from average_problems(config.optimizer)
    if config.optimizer.qk_clip > 0 and not clips_heads(config.model):
        yield (
            f"optimizer.qk_clip = {config.optimizer.qk_clip}: model.family = "
            f"{config.model.family!r} norms the queries and keys of each head, so that scaling "
            "their weights changes no logit; set it to 0"
        )


def _data(config: RunConfig) -> Iterator[str]:
    try:
        check_data_config(config.data)
    except ConfigError as error:
        yield str(error)
    is_bytes = config.data.kind == "text" and config.data.tokenizer == "bytes"
    if is_bytes and config.model.vocab < BYTE_VOCAB:
        yield (
            f"model.vocab = {config.model.vocab} is too small for data.tokenizer = 'bytes', which "
            f"has 256 bytes and a separator; set it to {BYTE_VOCAB} or more, or leave it out"
        )
    data = config.data
    if config.train.eval_every and data.eval_fraction == 0 and not data.validation:
        yield (
            "train.eval_every needs held-out data; set data.eval_fraction above 0, or name sets in "
            "[[data.validation]]"
        )


def _best(config: RunConfig) -> Iterator[str]:
    section, names = config.checkpoint, validation_names(config.data)
    if not section.keep_best:
        if section.best_by:
            yield (
                f"checkpoint.best_by = {shown(section.best_by)} with keep_best = 0, which keeps "
                "none for its loss; set keep_best, or leave it out"
            )
    elif not config.train.eval_every:
        yield (
            f"checkpoint.keep_best = {section.keep_best} needs losses of validation sets; set "
            "train.eval_every"
        )
    elif section.best_by and section.best_by not in names:
        yield choice_problem("checkpoint.best_by", section.best_by, names)


def _exchange(config: RunConfig) -> Iterator[str]:
    reduce_dtype = config.parallel.reduce_dtype
    if reduce_dtype != "auto" and config.numerics.reduction == "exact":
        yield (
            f"parallel.reduce_dtype = {reduce_dtype!r} rounds gradients on the wire, and "
            "numerics.reduction = 'exact' does not allow that; leave it out, or set "
            "numerics.reduction = 'fast'"
        )
    data, group = config.parallel.data, config.parallel.shard_group
    if group and config.parallel.shard == "optimizer":
        yield (
            f"parallel.shard_group = {group} with parallel.shard = 'optimizer', which makes no "
            "groups; leave it out, or set parallel.shard = 'gradients' or 'parameters'"
        )
    elif group > 0 and data > 0 and data % group:
        yield (
            f"parallel.shard_group = {group} does not divide parallel.data = {data}; change one, "
            "or leave it out: then all replicas are one group"
        )


def _batch(config: RunConfig) -> Iterator[str]:
    train, data = config.train, config.parallel.data
    if train.micro_batch >= 1 and train.global_batch % train.micro_batch:
        yield (
            f"train.global_batch = {train.global_batch} is not divisible by train.micro_batch = "
            f"{train.micro_batch}; change one of them"
        )
    elif train.micro_batch >= 1 and train.global_batch // train.micro_batch < data:
        yield (
            f"a step has {train.global_batch // train.micro_batch} micro-batches, fewer than "
            f"parallel.data = {data} replicas; lower parallel.data or raise train.global_batch"
        )
    yield from ramp_problems(train, max(1, data))
    if train.seq_len > config.model.max_seq_len:
        yield (
            f"train.seq_len = {train.seq_len} exceeds model.max_seq_len = "
            f"{config.model.max_seq_len}; "
            "lower the one or raise the other"
        )


def _tensor_shards(config: RunConfig) -> Iterator[str]:
    shards, tensor = config.numerics.tensor_shards, config.parallel.tensor
    if shards <= 1:
        return
    if shards & (shards - 1):
        yield (
            f"numerics.tensor_shards = {shards} is not a power of two; the partial sums of shards "
            "are added in pairs"
        )
    elif tensor >= 1 and shards % tensor:
        yield (
            f"parallel.tensor = {tensor} does not divide numerics.tensor_shards = {shards}; change "
            "one of them"
        )
    reason = "each shard has the norms of its own tokens"
    yield from _cut_of_tokens(config, "numerics.tensor_shards", shards, reason)


def _tensor_strips(config: RunConfig) -> Iterator[str]:
    strips, parts = config.numerics.tensor_strips, config.tensor_parts
    if strips <= 1 or parts < 1:
        return
    if strips % parts:
        yield (
            f"numerics.tensor_strips = {strips} is no multiple of {config.tensor_parts_key} = "
            f"{parts}; each has as many strips as the others"
        )
    reason = "tokens are exchanged before and after each layer"
    yield from _cut_of_tokens(config, "numerics.tensor_strips", strips, reason)


def _cut_of_tokens(config: RunConfig, key: str, count: int, reason: str) -> Iterator[str]:
    """The problems of a key by which the tokens of a slice are cut into `count`."""
    tokens = config.train.seq_len // max(1, config.train.context_chunks)
    if not config.parallel.sequence_parallel:
        yield f"{key} = {count} needs parallel.sequence_parallel = true: {reason}"
    if tokens % count:
        yield (
            f"a slice has {tokens} tokens (train.seq_len / train.context_chunks), which {key} = "
            f"{count} does not divide; change one of them"
        )


def _tensor(config: RunConfig) -> Iterator[str]:
    tensor, parallel = config.parallel.tensor, config.parallel
    if tensor > 1 and parallel.sequence_parallel and config.train.seq_len % tensor:
        yield (
            f"train.seq_len = {config.train.seq_len} is not divisible by parallel.tensor = "
            f"{tensor}, which splits sequences; change it, or set parallel.sequence_parallel = "
            "false"
        )


def _slices(config: RunConfig) -> Iterator[str]:
    train, parallel = config.train, config.parallel
    count, context = train.context_chunks, parallel.context
    if context >= 1 and count >= 1 and count % context:
        yield (
            f"parallel.context = {context} does not divide train.context_chunks = {count}; set the "
            "latter to a multiple of it: to twice as many, and ranks have equal work"
        )
    if count <= 1:
        return
    if train.seq_len % count:
        yield (
            f"train.context_chunks = {count} does not divide train.seq_len = {train.seq_len}; "
            "change one of them"
        )
        return
    tokens, tensor = train.seq_len // count, parallel.tensor
    if tensor > 1 and parallel.sequence_parallel and tokens % tensor:
        yield (
            f"a slice has {tokens} tokens (train.seq_len / train.context_chunks), which "
            f"parallel.tensor = {tensor} does not divide; change one of them, or set "
            "parallel.sequence_parallel = false"
        )
    elements = tokens * config.model.dim_per_head
    if config.numerics.reduction == "exact" and elements % _ALIGNED:
        yield (
            f"a slice has {tokens} tokens and a head {config.model.dim_per_head} elements: "
            f"numerics.reduction = 'exact' needs a multiple of {_ALIGNED} as their product; change "
            "train.context_chunks"
        )
    heads = config.model.heads
    parts = config.tensor_parts
    if parallel.context_exchange == "heads" and heads % (parts * context):
        yield (
            f"parallel.context_exchange = 'heads': {config.tensor_parts_key} x parallel.context = "
            f"{parts * context} does not divide model.heads = {heads}; use 'keys', or leave it out"
        )
    if parallel.context_exchange == "ring" and config.numerics.reduction == "exact":
        yield (
            "parallel.context_exchange = 'ring' joins parts of the keys in another order on each "
            "number of ranks, which numerics.reduction = 'exact' refuses; use 'keys' or 'heads', "
            "or numerics.reduction = 'fast'"
        )
    if parallel.context_exchange == "ring" and any(windows_of(config.model)):
        yield (
            "parallel.context_exchange = 'ring' sends all keys round, and layers of [model] see a "
            "window of them; use 'keys' or 'heads'"
        )
    if parallel.context_exchange == "ring" and config.optimizer.qk_clip > 0:
        yield (
            f"optimizer.qk_clip = {config.optimizer.qk_clip} with parallel.context_exchange = "
            "'ring', which tells no logits; use 'keys' or 'heads'"
        )


def _stretches(config: RunConfig) -> Iterator[str]:
    train, parallel = config.train, config.parallel
    count, context = parallel.stretches, parallel.context
    if count <= 1 or context < 1:
        return
    if train.context_chunks % (count * context):
        yield (
            f"parallel.stretches = {count}: stretches have whole slices, as many on each context "
            f"rank, but {count} x parallel.context = {count * context} does not divide "
            f"train.context_chunks = {train.context_chunks}; change one of them"
        )
    if parallel.schedule in SCHEDULES:  # of another name others tell
        try:
            check_stretches(parallel.schedule, count)
        except ScheduleError as error:
            yield str(error)
    if context > 1 and (
        parallel.context_exchange not in ("auto", "heads")
        or config.model.heads % (config.tensor_parts * context)
    ):
        yield (
            f"parallel.stretches = {count} with parallel.context = {context}: context ranks must "
            "exchange heads, which parallel.context_exchange or the number of heads does not "
            "allow; change it, or set parallel.stretches = 1"
        )
    if parallel.shard != "optimizer":
        yield (
            f"parallel.stretches = {count} with parallel.shard = {parallel.shard!r}: shared "
            "gradients and parameters travel by whole micro-batches; use parallel.shard = "
            "'optimizer', or set parallel.stretches = 1"
        )


def _pipeline(config: RunConfig) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.layers
    if min(parallel.pipeline, parallel.virtual) < 1:
        return
    chunks = parallel.pipeline * parallel.virtual
    if chunks <= RANGES["model"]["layers"].most + 2:  # of more, the split of layers is refused
        try:
            placement(parallel.schedule, parallel.pipeline, parallel.virtual)
        except ScheduleError as error:
            yield str(error)
    given = parallel.blocks_per_chunk
    if not given:
        if layers % chunks:
            yield (
                f"model.layers = {layers} is not divisible by parallel.pipeline x "
                "parallel.virtual = "
                f"{chunks}; change one of them, or give an uneven split in "
                "parallel.blocks_per_chunk"
            )
    elif len(given) != chunks or sum(given) != layers or min(given[1:-1], default=1) < 1:
        yield (
            f"parallel.blocks_per_chunk = {shown(given)}: must be {chunks} numbers "
            f"(pipeline x virtual) that add up to model.layers = {layers}, each 1 or "
            "more (0 for the first or last)"
        )
    elif min(given) < 0:
        yield f"parallel.blocks_per_chunk = {shown(given)}: numbers must not be negative"


def _audits(config: RunConfig) -> Iterator[str]:
    every, parallel = config.elastic.audit_every, config.parallel
    if not every:
        return
    if config.numerics.reduction != "exact":
        yield (
            f"elastic.audit_every = {every} with numerics.reduction = 'fast': only exact sums have "
            "the same bits on two ranks; set numerics.reduction = 'exact'"
        )
    if parallel.shard != "optimizer":
        yield (
            f"elastic.audit_every = {every} with parallel.shard = {parallel.shard!r}: a rank then "
            "keeps no sums of its own to audit; set parallel.shard = 'optimizer'"
        )
    if parallel.expert > 1:
        yield (
            f"elastic.audit_every = {every} with parallel.expert = {parallel.expert}: experts add "
            "gradients of other ranks' micro-batches; set parallel.expert = 1"
        )
    if parallel.data == 1:
        yield (
            f"elastic.audit_every = {every} with parallel.data = 1: no other rank can compute a "
            "stage's micro-batch; use two replicas or more, three to name the wrong one surely"
        )


def _claims(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if not config.elastic.claims:
        return
    said = "elastic.claims = true"
    if config.numerics.reduction != "exact":
        yield (
            f"{said} with numerics.reduction = 'fast': only exact sums are the same whichever rank "
            "computes what; set numerics.reduction = 'exact'"
        )
    if parallel.shard != "optimizer":
        yield (
            f"{said} with parallel.shard = {parallel.shard!r}: replicas that share more compute at "
            "the same time; set parallel.shard = 'optimizer'"
        )
    if parallel.expert > 1:
        yield (
            f"{said} with parallel.expert = {parallel.expert}: ranks that share experts compute at "
            "the same time; set parallel.expert = 1"
        )
    if parallel.pipeline > 1:
        yield (
            f"{said} with parallel.pipeline = {parallel.pipeline}: stages follow a program that is "
            "made before the step; set parallel.pipeline = 1"
        )
    if config.elastic.slow_ranks == "relieve":
        yield (
            f"{said} with elastic.slow_ranks = 'relieve': ranks that claim take by their speed "
            "already; set elastic.slow_ranks = 'report'"
        )
    if config.offload.activations != "none":
        yield (
            f"{said} with offload.activations = {config.offload.activations!r}: the amount that "
            "is offloaded follows a program; set offload.activations = 'none'"
        )
    if parallel.backend == "mpi" and not config.elastic.enabled:
        yield (
            f"{said} with parallel.backend = 'mpi': claims ask the rendezvous store, which a run "
            "over MPI alone does not have; set elastic.enabled = true, or another backend"
        )


def _elastic(config: RunConfig) -> Iterator[str]:
    elastic, ranks = config.elastic, config.parallel.ranks
    if elastic.enabled and (problem := elastic_problem("elastic.enabled = true")):
        yield f"{problem}, or set elastic.enabled = false"
    if not 1 <= elastic.min_ranks <= max(1, ranks):
        yield f"elastic.min_ranks = {elastic.min_ranks}: must be 1 to {ranks}, the number of ranks"
    if elastic.heartbeat_timeout_ms < 3 * elastic.heartbeat_ms:
        yield (
            f"elastic.heartbeat_ms = {elastic.heartbeat_ms}, heartbeat_timeout_ms = "
            f"{elastic.heartbeat_timeout_ms}: the time-out must be at least three heartbeats"
        )
    yield from _audits(config)
    yield from _claims(config)
    if elastic.lighthouse and not _LIGHTHOUSE.fullmatch(elastic.lighthouse):
        yield (
            f"elastic.lighthouse = {shown(elastic.lighthouse)}: must be HOST:PORT or "
            "http://HOST:PORT, with a port of 1 to 65535; or leave it empty"
        )
    if elastic.enabled and config.parallel.backend == "mpi" and elastic.respawn:
        yield (
            "elastic.respawn = true with parallel.backend = 'mpi': the processes of an MPI job "
            "are fixed; set elastic.respawn = false, or use 'gloo' or 'nccl'"
        )


def _rewinding(config: RunConfig) -> Iterator[str]:
    numerics, steps = config.numerics, config.elastic.rewind
    if numerics.spike_action != "rewind":
        return
    if not numerics.spike_window:
        yield (
            'numerics.spike_action = "rewind" with numerics.spike_window = 0: no step is taken for '
            "a spike; set numerics.spike_window, as 128"
        )
    if not steps:
        yield (
            'numerics.spike_action = "rewind" with elastic.rewind = 0: no step can be taken back; '
            "set elastic.rewind, as 4"
        )


def _offload(config: RunConfig) -> Iterator[str]:
    offload = config.offload
    if offload.least_share > offload.most_share:
        yield (
            f"offload.least_share = {offload.least_share}, most_share = {offload.most_share}: "
            "the least must not be above the most"
        )
    if offload.activations == "host" and config.train.device == "cpu":
        yield (
            "offload.activations = 'host' with train.device = 'cpu': activations are in host "
            "memory already; use 'ssd' or 'none'"
        )


def _recompute(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.recompute == "auto" and not train.activation_gib:
        yield (
            "train.recompute = 'auto' with train.activation_gib = 0: say how much memory "
            "activations may "
            "take on a rank"
        )


def _experts(config: RunConfig) -> Iterator[str]:
    """Where experts are spread over more than the tensor ranks of each replica."""
    parallel, family = config.parallel, family_of(config.model.family)
    ranks, experts = parallel.expert, family.experts(config.model)
    replicas = parallel.expert_replicas
    if replicas == "auto" and not config.elastic.enabled:
        yield (
            "parallel.expert_replicas = 'auto' without elastic.enabled: only an elastic run moves "
            "experts; give a number, or set elastic.enabled = true"
        )
    if replicas != "auto" and parallel.expert_slots:
        yield (
            f"parallel.expert_slots = {parallel.expert_slots} without parallel.expert_replicas = "
            "'auto'; set it to 0"
        )
    if (replicas == "auto" or replicas > 1) and ranks <= parallel.tensor:
        yield (
            f"parallel.expert_replicas = {replicas!r} with parallel.expert = {ranks}: copies lie "
            f"on other ranks; make parallel.expert more than parallel.tensor = {parallel.tensor}"
        )
    elif replicas != "auto" and replicas > ranks:
        yield (
            f"parallel.expert_replicas = {replicas} exceeds parallel.expert = {ranks}: no rank has "
            "two copies; lower it"
        )
    if 0 < parallel.expert_slots * ranks < experts:
        yield (
            f"parallel.expert_slots = {parallel.expert_slots} on {ranks} ranks (parallel.expert) "
            f"are fewer than model.experts = {experts}; raise it"
        )
    if ranks <= 1 or min(parallel.tensor, parallel.context, parallel.data) < 1:
        return
    said = f"parallel.expert = {ranks}"
    if not experts:
        yield f"{said}: model.family = {config.model.family!r} has no experts; set it to 1"
        return
    if ranks > experts:
        yield f"{said} exceeds model.experts = {experts}; lower it"
    replica = parallel.tensor * parallel.context
    if ranks % parallel.tensor:
        yield (
            f"{said} is no multiple of parallel.tensor = {parallel.tensor}, whose ranks have "
            "experts each; change one of them"
        )
    elif replica * parallel.data % lcm(replica, ranks):
        yield (
            f"{said}: the {replica * parallel.data} ranks of a stage (tensor x context x data) "
            f"cannot be divided into whole replicas of {replica} that have the experts together; "
            f"make parallel.data a multiple of {lcm(replica, ranks) // replica}"
        )


def _packages(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.backend == "mpi" and importlib.util.find_spec("mpi4py") is None:
        yield "parallel.backend = 'mpi' needs mpi4py; pip install 'holdfast[mpi]'"
    if parallel.backend == "mpi" and config.train.device == "cuda":
        yield (
            "parallel.backend = 'mpi' carries CPU tensors, but train.device = 'cuda'; use 'nccl', "
            "or set train.device = 'cpu'"
        )
    if config.data.kind == "megatron" and importlib.util.find_spec("megatron") is None:
        yield ("data.kind = 'megatron' needs megatron-core; pip install 'holdfast[megatron]'")
