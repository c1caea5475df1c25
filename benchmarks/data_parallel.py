"""A whole training step, two replicas, beside DDP, FSDP2 and DeepSpeed; one process beside a plain
loop.

The same Llama (tests/support/oracles/plain_llama.py for the peers), batch, micro-batches, fused
AdamW and clipping everywhere, over gloo, one thread per rank. Contestants alternate.

    python benchmarks/data_parallel.py [--repetitions 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

import msgspec

from harness import Measurement, report
from holdfast.trainer.config import RunConfig
from support.oracles.plain_llama import PlainLlama, Shape
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config

RANKS = 2
MODEL = {
    "layers": 4,
    "hidden": 384,
    "intermediate": 1024,
    "heads": 6,
    "kv_heads": 6,
    "vocab": 1024,
    "dropout": 0.0,
}
SEQ_LEN, MICRO_BATCH = 128, 2
BETAS, EPS, WEIGHT_DECAY, LR, CLIP = (0.9, 0.95), 1e-8, 0.1, 1e-3, 1.0


def our_config(reduction: str, ranks: int, global_batch: int) -> dict[str, Any]:
    config: RunConfig = make_config(
        model=MODEL,
        train={
            "seq_len": SEQ_LEN,
            "global_batch": global_batch,
            "micro_batch": MICRO_BATCH,
            "steps": 1000,
        },
        optimizer={"lr": LR, "block_elements": 262144},
        numerics={"reduction": reduction},
        parallel={"data": ranks},
    )
    return msgspec.to_builtins(config)


def plain_model() -> PlainLlama:
    names = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")
    torch.manual_seed(0)
    return PlainLlama(Shape(**{name: MODEL[name] for name in names}))


def micro_batches(rank: int, ranks: int, global_batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(MODEL["vocab"], (global_batch, SEQ_LEN + 1), generator=generator)
    return list(tokens.chunk(ranks)[rank].split(MICRO_BATCH))


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


def ours(reduction: str, rank: int, ranks: int, batch: int, store: Any) -> Callable[[], None]:
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    config = msgspec.convert(our_config(reduction, ranks, batch), RunConfig)
    training = open_training(config, local_world(rank, ranks), store)
    step = [0]

    def run() -> None:
        training.compute(step[0])
        training.apply(training.vote(*training.reduce()), LR)
        step[0] += 1

    return run


def plain(rank: int, ranks: int, batch: int, model: nn.Module, no_sync: Any) -> Any:
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR, betas=BETAS, eps=EPS, fused=True)
    parts = micro_batches(rank, ranks, batch)
    count = len(parts) * MICRO_BATCH * SEQ_LEN

    def run() -> None:
        optimizer.zero_grad()
        for number, tokens in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else no_sync():
                loss_of(model, tokens, count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return run


def ddp(rank: int, ranks: int, batch: int, store: Any) -> Callable[[], None]:
    wrapped = nn.parallel.DistributedDataParallel(plain_model())
    return plain(rank, ranks, batch, wrapped, wrapped.no_sync)


def fsdp2(rank: int, ranks: int, batch: int, store: Any) -> Callable[[], None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    model = plain_model()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)

    class NoSync:
        def __enter__(self) -> None:
            model.set_requires_gradient_sync(False)

        def __exit__(self, *_: object) -> None:
            model.set_requires_gradient_sync(True)

    return plain(rank, ranks, batch, model, NoSync)


def deepspeed_zero1(rank: int, ranks: int, batch: int, store: Any) -> Callable[[], None]:
    import deepspeed

    parts = micro_batches(rank, ranks, batch)
    model = plain_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups_of(model),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
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
    count = MICRO_BATCH * SEQ_LEN

    def run() -> None:
        for tokens in parts:
            engine.backward(loss_of(engine, tokens, count))
            engine.step()

    return run


def measure(
    rank: int, ranks: int, store: Any, *, contestants: list[str], repetitions: int, batch: int
) -> dict[str, list[float]]:
    """Seconds per step of each contestant on this rank, in turn."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        DS_ACCELERATOR="cpu",
    )
    torch.use_deterministic_algorithms(False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    builders = {
        "holdfast, fast": lambda: ours("fast", rank, ranks, batch, dist.PrefixStore("f", store)),
        "holdfast, exact": lambda: ours("exact", rank, ranks, batch, dist.PrefixStore("e", store)),
        "plain loop, fused AdamW": lambda: plain(rank, ranks, batch, plain_model(), nullcontext),
        "DDP, fused AdamW": lambda: ddp(rank, ranks, batch, store),
        "FSDP2, fused AdamW": lambda: fsdp2(rank, ranks, batch, store),
        "DeepSpeed ZeRO-1": lambda: deepspeed_zero1(rank, ranks, batch, store),
    }
    runs = {name: builders[name]() for name in contestants}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            if repetition:
                times[name].append(time.perf_counter() - start)
    dist.destroy_process_group()
    return times


def compare(
    title: str,
    ranks: int,
    batch: int,
    contestants: list[str],
    against: str,
    arguments: Any,
    path: str | None,
) -> None:
    cluster = Cluster()
    times = cluster.run(
        "data_parallel:measure",
        ranks,
        contestants=contestants,
        repetitions=arguments.repetitions,
        batch=batch,
        timeout_s=1200,
    )[0]
    cluster.close()
    rows = [Measurement(name, tuple(values)) for name, values in times.items()]
    reference = next(row.median_s for row in rows if row.name == against)
    note = (
        f"{MODEL['layers']} blocks of width {MODEL['hidden']}, seq {SEQ_LEN}, {batch} sequences a "
        f"step in micro-batches of {MICRO_BATCH}; ratio = time / {against}"
    )
    report(title, rows, {row.name: reference for row in rows}, json_path=path, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="prefix of the files to write")
    arguments = parser.parse_args()
    both = ["holdfast, fast", "holdfast, exact"]
    peers = ["DDP, fused AdamW", "FSDP2, fused AdamW", "DeepSpeed ZeRO-1"]
    prefix = arguments.json
    for each in (8, 1):
        compare(
            f"training step, 2 replicas, {each} micro-batches each",
            RANKS,
            RANKS * each * MICRO_BATCH,
            both + peers,
            "DDP, fused AdamW",
            arguments,
            f"{prefix}-two-{each}.json" if prefix else None,
        )
    compare(
        "training step, one process, 8 micro-batches",
        1,
        8 * MICRO_BATCH,
        [*both, "plain loop, fused AdamW"],
        "plain loop, fused AdamW",
        arguments,
        f"{prefix}-one.json" if prefix else None,
    )


if __name__ == "__main__":
    main()
