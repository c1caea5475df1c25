"""Whole training steps of Holdfast and of its peers, as functions that make one step each.

The same Llama (tests/support/oracles/plain_llama.py for the peers), micro-batches, fused AdamW and
clipping everywhere, in fp32. A contestant is built on every rank, over gloo.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))

from holdfast.trainer.config import RunConfig
from support.oracles.plain_llama import PlainLlama, Shape
from support.runs.small_runs import make_config

BETAS, EPS, WEIGHT_DECAY, LR, CLIP = (0.9, 0.95), 1e-8, 0.1, 1e-3, 1.0

Step = Callable[[], None]


def nothing() -> None:
    """What most contestants have left to do after their last step."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A contestant on one rank."""

    step: Step
    settle: Step = nothing
    """Waits for what the last step has left under way."""

    def run(self, steps: int) -> None:
        """Make some steps, whole to the last byte."""
        for _ in range(steps):
            self.step()
        self.settle()


@dataclass(frozen=True, slots=True)
class Work:
    """One training step: a model, and the batch of each replica."""

    model: Mapping[str, int]
    """layers, hidden, intermediate, heads, kv_heads, vocab."""
    ranks: int
    micro_batches: int
    """Of each replica."""
    micro_batch: int
    """Sequences of a micro-batch."""
    seq_len: int

    @property
    def global_batch(self) -> int:
        """Sequences of a step over all replicas."""
        return self.ranks * self.micro_batches * self.micro_batch

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in PlainLlama(Shape(**self.model)).parameters())

    def __str__(self) -> str:
        return (
            f"{self.model['layers']} blocks of width {self.model['hidden']}, seq {self.seq_len}, "
            f"{self.global_batch} sequences a step in micro-batches of {self.micro_batch}"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contestant is built: this rank, and how it meets the others."""

    rank: int
    store: Any
    """A store of this contestant's own."""
    host: str = "127.0.0.1"
    """The address of the store's machine."""


def our_config(
    work: Work, reduction: str, *, elastic: bool = False, shard: str = "optimizer"
) -> RunConfig:
    return make_config(
        model=dict(work.model) | {"dropout": 0.0},
        train={
            "seq_len": work.seq_len,
            "global_batch": work.global_batch,
            "micro_batch": work.micro_batch,
            "steps": 1000,
        },
        optimizer={"lr": LR, "block_elements": 262144},
        numerics={"reduction": reduction},
        parallel={"data": work.ranks, "shard": shard},
        elastic={"enabled": elastic},
    )


def ours(work: Work, place: Place, reduction: str, shard: str = "optimizer") -> Contestant:
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    world = replace(local_world(place.rank, work.ranks), store_host=place.host)
    config = our_config(work, reduction, shard=shard)
    return steps_of(open_training(config, world, place.store))


def ours_elastic(work: Work, place: Place, reduction: str, redundancy: int) -> Contestant:
    """What an elastic run steps with while nothing is lost; each rank is a machine."""
    from holdfast.parallel.comm import build_groups
    from holdfast.parallel.plan import Roster, with_shadows
    from holdfast.trainer.step.build import backend_of, choose_device
    from holdfast.trainer.step.planning import plan_of
    from holdfast.trainer.step.training import Training

    config = our_config(work, reduction, elastic=True)
    device = choose_device(config, 0)
    ranks = tuple(range(work.ranks))
    roster = Roster(ranks, {rank: str(rank) for rank in ranks})
    plan = with_shadows(plan_of(config), roster, redundancy)
    groups = build_groups(
        place.store,
        place.host,
        place.rank,
        ranks,
        {
            **plan.axis_groups(place.rank),
            "pipeline": plan.configured_mesh.pipeline_group(place.rank),
        },
        backend=backend_of(config, device),
        generation=0,
    )
    return steps_of(Training(config, place.rank, device, plan, groups))


def steps_of(training: Any) -> Contestant:
    step = [0]

    def run() -> None:
        training.compute(step[0])
        training.vote(*training.reduce())
        training.apply(LR)
        step[0] += 1

    return Contestant(run, training.finish_gather)


def plain_model(work: Work) -> PlainLlama:
    torch.manual_seed(0)
    return PlainLlama(Shape(**work.model))


def micro_batches(work: Work, rank: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (work.global_batch, work.seq_len + 1)
    tokens = torch.randint(work.model["vocab"], shape, generator=generator)
    return tokens.chunk(work.ranks)[rank].split(work.micro_batch)


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor, count: int) -> Tensor:
    logits = model(tokens[:, :-1])
    targets = tokens[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / count


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]


def plain(
    work: Work, place: Place, model: nn.Module, exchanging: Callable[[bool], Any]
) -> Contestant:
    """The usual loop.

    Args:
        exchanging: gives the context of a micro-batch's passes, whether or not gradients are
            exchanged after it.
    """
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR, betas=BETAS, eps=EPS, fused=True)
    parts = micro_batches(work, place.rank)
    count = len(parts) * work.micro_batch * work.seq_len

    def run() -> None:
        optimizer.zero_grad()
        for number, tokens in enumerate(parts):
            with exchanging(number == len(parts) - 1):
                loss_of(model, tokens, count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return Contestant(run)


def alone(work: Work, place: Place) -> Contestant:
    """The same computation with no exchange."""
    return plain(work, place, plain_model(work), lambda _: nullcontext())


def ddp(work: Work, place: Place) -> Contestant:
    wrapped = nn.parallel.DistributedDataParallel(plain_model(work), gradient_as_bucket_view=True)
    return plain(work, place, wrapped, lambda last: nullcontext() if last else wrapped.no_sync())


def fsdp2(
    work: Work, place: Place, *, keeps_parameters: bool, keeps_gradients: bool = True
) -> Contestant:
    """FSDP2, a group per block.

    Args:
        keeps_parameters: gather parameters once a step and keep them until its last backward pass;
            False (the default of FSDP2): gather them for each pass of each micro-batch.
        keeps_gradients: keep whole gradients and reduce them once a step; False (its default):
            reduce them, and keep a share, after each micro-batch.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (work.ranks,))
    model: Any = plain_model(work)
    how: dict[str, Any] = {"mesh": mesh}
    if keeps_parameters:
        how["reshard_after_forward"] = False
    for block in model.model.layers:
        fully_shard(block, **how)
    fully_shard(model, **how)

    def exchanging(last: bool) -> Any:
        model.set_requires_gradient_sync(last or not keeps_gradients)
        if keeps_parameters:
            model.set_reshard_after_backward(last)
        return nullcontext()

    return plain(work, place, model, exchanging)


def deepspeed_zero1(work: Work, place: Place) -> Contestant:
    import deepspeed

    parts = micro_batches(work, place.rank)
    model = plain_model(work)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups_of(model),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": work.micro_batch,
            "gradient_accumulation_steps": len(parts),
            "gradient_clipping": CLIP,
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": LR,
                    "betas": BETAS,
                    "eps": EPS,
                    "weight_decay": WEIGHT_DECAY,
                    "torch_adam": True,
                },
            },
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    count = work.micro_batch * work.seq_len

    def run() -> None:
        for tokens in parts:
            engine.backward(loss_of(engine, tokens, count))
            engine.step()

    return Contestant(run)


BUILDERS: Mapping[str, Callable[[Work, Place], Contestant]] = {
    "holdfast, fast": lambda work, place: ours(work, place, "fast"),
    "holdfast, exact": lambda work, place: ours(work, place, "exact"),
    "DDP, fused AdamW": ddp,
    "FSDP2, fused AdamW": lambda work, place: fsdp2(work, place, keeps_parameters=True),
    "FSDP2, whole gradients": lambda work, place: fsdp2(work, place, keeps_parameters=False),
    "FSDP2, ZeRO-3": lambda work, place: fsdp2(
        work, place, keeps_parameters=False, keeps_gradients=False
    ),
    "holdfast, fast, parameters": lambda work, place: ours(work, place, "fast", "parameters"),
    "holdfast, exact, parameters": lambda work, place: ours(work, place, "exact", "parameters"),
    "holdfast, exact, gradients": lambda work, place: ours(work, place, "exact", "gradients"),
    "DeepSpeed ZeRO-1": deepspeed_zero1,
    "holdfast, fast, elastic, no shadows": lambda work, place: ours_elastic(work, place, "fast", 0),
    "holdfast, fast, elastic, 1 shadow": lambda work, place: ours_elastic(work, place, "fast", 1),
    "plain loop, fused AdamW": alone,
}
"""By name, the function that builds a contestant on one rank."""


def build(
    names: Sequence[str], work: Work, rank: int, store: Any, host: str
) -> dict[str, Contestant]:
    """The named contestants on this rank. Collective over all ranks.

    Args:
        store: the store of all ranks, which `host` serves.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(work.ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR=host,
        MASTER_PORT="0",
        DS_ACCELERATOR="cpu",
    )
    torch.use_deterministic_algorithms(False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=work.ranks)
    return {
        name: BUILDERS[name](work, Place(rank, dist.PrefixStore(name, store), host))
        for name in names
    }
