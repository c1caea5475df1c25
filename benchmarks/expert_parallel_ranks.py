"""What the ranks of benchmarks/expert_parallel.py do, each in its own network namespace."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from executor import make_sleeps_exact
from link_ranks import PORT, Node, enter
from tensor_strips_ranks import Device

RANKS = 4
PER_TOKEN = 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """The layer, and what is timed."""

    hidden: int
    intermediate: int
    experts: int
    tokens: int
    """Of each rank."""
    repetitions: int
    preference: float = 0.0
    """How much routers prefer the first experts to the last, in the logits."""
    flops_per_s: float = 0.0
    """Of a device that is emulated; 0: the products are computed here."""


class _Expert(nn.Module):
    """SwiGLU, as DeepSpeed's layer takes it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.hidden, 2 * sizes.intermediate, bias=False)
        self.down = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        gate, up = self.up(value).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


def beside_deepspeed(
    rank: int, ranks: int, _: Any, *, nodes: Sequence[Node], sizes: Sizes
) -> dict[str, list[float]]:
    """Seconds of a pass forwards and backwards on this rank, by contestant."""
    store = _begin(rank, ranks, nodes)
    import deepspeed
    from deepspeed.moe.layer import MoE

    dist.init_process_group(
        "gloo", store=dist.PrefixStore("theirs", store), rank=rank, world_size=ranks
    )
    deepspeed.init_distributed("gloo")

    def theirs(**keys: Any) -> Callable[[], None]:
        layer = MoE(
            sizes.hidden,
            _Expert(sizes),
            num_experts=sizes.experts,
            ep_size=ranks,
            k=PER_TOKEN,
            min_capacity=0,
            **keys,
        )
        layer.set_deepspeed_parallelism()
        layer.deepspeed_moe.gate.wg.weight.data.copy_(_router_weights(sizes))
        return _pass(lambda value: layer(value)[0], layer, sizes, rank)

    group = _group(store, nodes, rank, ranks)
    hosts = tuple((e * ranks // sizes.experts,) for e in range(sizes.experts))

    def mine(*, joins: bool) -> Callable[[], None]:
        ours, layer = _ours(sizes, group, hosts, joins)
        return _pass(lambda value: ours(value, {}), layer, sizes, rank)

    runs = {
        "holdfast, fast mode": mine(joins=True),
        "DeepSpeed, no token dropped": theirs(drop_tokens=False),
        "DeepSpeed, tokens above the mean dropped": theirs(capacity_factor=1.0),
        "holdfast, exact mode": mine(joins=False),
    }
    found = _timed(runs, group, sizes)
    dist.destroy_process_group()
    return found


def with_copies(
    rank: int, ranks: int, _: Any, *, nodes: Sequence[Node], sizes: Sizes
) -> dict[str, list[float]]:
    """The same of a skewed router, with one copy of each expert, and with copies by load."""
    from holdfast.parallel.plan.expert_hosts import copies_by_load, first_hosts, overlapping_hosts

    store = _begin(rank, ranks, nodes)
    group = _group(store, nodes, rank, ranks)
    shares = torch.tensor([1 / (expert + 1) for expert in range(sizes.experts)])
    drawn = torch.Generator().manual_seed(rank)
    chosen = torch.multinomial(shares.expand(sizes.tokens, -1), PER_TOKEN, generator=drawn)
    counts = chosen.flatten().bincount(minlength=sizes.experts)
    group.all_reduce(counts).wait()
    loads, slots = counts.tolist(), 2 * -(-sizes.experts // ranks)
    alone = first_hosts(range(ranks), sizes.experts, ranks)
    copies = overlapping_hosts(copies_by_load(loads, ranks, slots), range(ranks), slots, loads)
    runs = {}
    for name, hosts in (("one copy of each", alone), ("copies by load", copies)):
        ours, layer = _ours(sizes, group, hosts, joins=False)
        runs[name] = _pass(lambda value, ours=ours: ours(value, {0: chosen}), layer, sizes, rank)
    return _timed(runs, group, sizes)


def _begin(rank: int, ranks: int, nodes: Sequence[Node]) -> Any:
    torch.set_num_threads(1)
    make_sleeps_exact()
    _keep_the_heap()
    enter(nodes[rank])
    return dist.TCPStore(nodes[rank].master, PORT, ranks, is_master=rank == 0)


def _keep_the_heap() -> None:
    """Keep freed memory, for all contestants: first touches of pages would differ by chance."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _group(store: Any, nodes: Sequence[Node], rank: int, ranks: int) -> Any:
    from holdfast.parallel.comm import separate_group

    ours = dist.PrefixStore("ours", store)
    return separate_group(ours, nodes[rank].master, "experts", range(ranks), rank, timeout_s=600)


def _ours(
    sizes: Sizes, group: Any, hosts: tuple[tuple[int, ...], ...], joins: bool
) -> tuple[Any, nn.Module]:
    """The forward pass of our layer, and its module."""
    from holdfast.parallel.pipeline import ExpertTeam, MicroBatchContext, WeightGradientQueue
    from holdfast.parallel.tensor_parallel import TensorParallel
    from holdfast.trainer.models.decoder.experts import Experts
    from holdfast.trainer.models.decoder.section import ExpertDesign, RouterDesign
    from holdfast.trainer.models.qwen3_moe.family import Qwen3MoeConfig

    model = Qwen3MoeConfig(family="qwen3_moe", layers=1, hidden=sizes.hidden, vocab=8)
    design = ExpertDesign(
        count=sizes.experts,
        per_token=PER_TOKEN,
        intermediate=sizes.intermediate,
        router=RouterDesign(aux_loss=0.01, z_loss=0.0),
    )
    own = [expert for expert, members in enumerate(hosts) if group.index in members]
    layer = Experts(model, design, 1, TensorParallel(None, False), WeightGradientQueue(), own)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    layer.router.data.copy_(_router_weights(sizes))
    team = ExpertTeam(group, tuple(range(group.size)), {1: hosts}, 1, joins)
    context = MicroBatchContext(0, group.index, True, None, experts=team)

    def forward(value: Tensor, decisions: dict[int, Tensor]) -> Tensor:
        return layer([value], context, [()], dict(decisions))[0]

    return forward, layer


def _router_weights(sizes: Sizes) -> Tensor:
    """float[experts, hidden]: the first value of each token, which is 1, meets the preferences."""
    drawn = torch.Generator().manual_seed(7)
    weights = 0.02 * torch.randn(sizes.experts, sizes.hidden, generator=drawn)
    weights[:, 0] = torch.linspace(sizes.preference, -sizes.preference, sizes.experts)
    return weights


def largest_load(sizes: Sizes) -> float:
    """The tokens of the expert that most of a rank's chose, over the mean: the largest of ranks."""
    weights, found = _router_weights(sizes), 0
    for rank in range(RANKS):
        chosen = (_tokens(sizes, rank)[:, 0] @ weights.t()).topk(PER_TOKEN).indices
        found = max(found, int(chosen.flatten().bincount(minlength=sizes.experts).max()))
    return found * sizes.experts / (sizes.tokens * PER_TOKEN)


def _tokens(sizes: Sizes, rank: int) -> Tensor:
    drawn = torch.Generator().manual_seed(rank)
    value = torch.randn(sizes.tokens, 1, sizes.hidden, generator=drawn)
    value[..., 0] = 1
    return value


def _pass(
    forward: Callable[[Tensor], Tensor], layer: nn.Module, sizes: Sizes, rank: int
) -> Callable[[], None]:
    value = _tokens(sizes, rank).requires_grad_()
    drawn = torch.Generator().manual_seed(RANKS + rank)
    gradient = torch.randn(sizes.tokens, 1, sizes.hidden, generator=drawn)

    def run() -> None:
        for parameter in (value, *layer.parameters()):
            parameter.grad = None
        forward(value).backward(gradient)

    return run


def _timed(
    runs: Mapping[str, Callable[[], None]], group: Any, sizes: Sizes
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _repetition in range(sizes.repetitions + 1):
        for name, run in runs.items():
            group.barrier()
            with Device(sizes.flops_per_s) if sizes.flops_per_s else nullcontext():
                start = time.perf_counter()
                run()
                group.barrier()
            found[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in found.items()}
