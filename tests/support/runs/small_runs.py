"""Small runs that tests start on the pool: a configuration as nested dicts, and what a run gave."""

from __future__ import annotations

import json
import os
import signal
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from torch.distributed import Store

from holdfast.trainer.config import RunConfig, convert_config

if TYPE_CHECKING:
    from holdfast.trainer.check.capture import RankCapture
    from holdfast.trainer.check.compare import Finding

SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "family": "llama",
        "layers": 6,
        "hidden": 32,
        "intermediate": 48,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 67,
        "dropout": 0.1,
    },
    "data": {"kind": "synthetic"},
    "train": {"steps": 20, "seq_len": 16, "global_batch": 12, "micro_batch": 1, "device": "cpu"},
    "optimizer": {"lr": 1e-2, "warmup_steps": 2, "block_elements": 512},
}


def make_config(**sections: dict[str, Any]) -> RunConfig:
    """`SMALL` with keys of some sections replaced."""
    merged = {name: dict(keys) for name, keys in SMALL.items()}
    for name, keys in sections.items():
        merged.setdefault(name, {}).update(keys)
    return convert_config(merged)


def world_size_of(config: RunConfig) -> int:
    return config.parallel.ranks


def train_steps(rank: int, world_size: int, store: Store, *, config: dict) -> dict[str, Any]:
    """Train all steps on this rank: exact losses and norms, and a digest of the parameters."""
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    training = open_training(run_config, local_world(rank, world_size), store)
    losses, norms, layers, outputs, further = [], [], [], [], []
    for step in range(run_config.train.steps):
        training.compute(step)
        outcome = training.vote(*training.reduce())
        further.append([loss.hex() for loss in outcome.further_losses])
        training.apply(run_config.rate_of(step))
        losses.append(outcome.loss.hex())
        norms.append(outcome.grad_norm.hex())
        layers.append(outcome.layer_norms)
        outputs.append(outcome.layer_outputs)
    found = {"losses": losses, "norms": norms, "digest": training.parameter_digest()}
    found |= {"further": further} if any(further) else {}
    if run_config.train.eval_every:
        found["held out"] = [loss.hex() for loss in training.evaluate().values()]
    noted = {"layer_norms": layers, "layer_outputs": outputs}
    return found | (noted if run_config.log.norms_every else {})


def train_with_shadows(rank: int, world_size: int, store: Store, *, config: dict) -> Any:
    """Losses, digest, whether there are shadows, and how many of them differ from their owner."""
    from unittest import mock

    from holdfast.parallel.plan.replan import Roster, with_shadows
    from holdfast.trainer.elastic.corruption import compare_copies
    from holdfast.trainer.elastic.state_recovery import fill_shadows
    from holdfast.trainer.step import build
    from holdfast.trainer.worlds.world import local_world

    nodes = {r: f"node{r}" for r in range(world_size)}
    roster = Roster(tuple(range(world_size)), nodes)
    plan_of = build.plan_of
    with mock.patch.object(build, "plan_of", lambda c: with_shadows(plan_of(c), roster, 1)):
        run_config = convert_config(config)
        training = build.open_training(run_config, local_world(rank, world_size), store)
    fill_shadows(training, training.groups.world, nodes)
    losses = []
    for step in range(run_config.train.steps):
        training.compute(step)
        losses.append(training.vote(*training.reduce()).loss.hex())
        training.apply(run_config.rate_of(step))
    kept = sum(block.stop - block.start for block in training.shadows.blocks)
    wrong = len(compare_copies(training, training.groups.world).corrupt)
    return losses, training.parameter_digest(), kept > 0, wrong


def threads_here(rank: int, world_size: int, store: Store) -> int:
    """The threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def train_in(
    rank: int,
    world_size: int,
    store: Store,
    *,
    config: dict,
    root: str,
    resume: str = "auto",
    allow_change: tuple[str, ...] = (),
    kill: tuple[int, int] | None = None,
) -> None:
    """The whole training loop in a run's folder, resumed where it can be.

    Args:
        kill: (rank, step): that rank sends SIGKILL to itself when it has computed that step.
    """
    from holdfast.trainer.loop import train
    from holdfast.trainer.run.resume import find_resume
    from holdfast.trainer.run.run_directory import RunDirectory
    from holdfast.trainer.step.training import Training
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    path = Path(root)
    path.mkdir(parents=True, exist_ok=True)
    found = find_resume(path, run_config, resume, allow_change=tuple(allow_change))
    compute = Training.compute

    def compute_and_die(self: Training, step: int, *at: Any, **only: Any) -> Any:
        times = compute(self, step, *at, **only)
        if kill == (rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return times

    Training.compute = compute_and_die  # type: ignore[method-assign]
    try:
        train(run_config, local_world(rank, world_size), store, RunDirectory(path, found))
    finally:
        Training.compute = compute  # type: ignore[method-assign]


def metrics_of(root: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def events_of(root: Path, kind: str) -> list[dict[str, Any]]:
    """A run's events of one kind."""
    lines = (root / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def run_training(cluster: Any, config: RunConfig, *, timeout_s: float = 90.0) -> dict[str, Any]:
    """Run `config` on the pool; all ranks must agree on what they saw."""
    plain = msgspec.to_builtins(config)
    ranks = world_size_of(config)
    results = cluster.run(
        "support.runs.small_runs:train_steps", ranks, timeout_s=timeout_s, config=plain
    )
    assert all(result == results[0] for result in results), "ranks disagree"
    return results[0]


def findings_of(
    cluster: Any, config: RunConfig, bug: str = "", *, timeout_s: float = 90.0
) -> list[Finding]:
    """How a layout differs from one process, with a bug put in first if one is named."""
    from holdfast.trainer.check.compare import compare

    ranks = cluster.run(
        "support.runs.small_runs:check_layout",
        world_size_of(config),
        timeout_s=timeout_s,
        config=msgspec.to_builtins(config),
        bug=bug,
    )
    return compare(ranks, reference_of(config))


def reference_of(config: RunConfig) -> RankCapture:
    """What one process computes, once for all layouts."""
    train = msgspec.structs.replace(config.train, recompute="none")
    alone = msgspec.structs.replace(config, parallel=type(config.parallel)(), train=train)
    return _reference_of(msgspec.json.encode(alone))


@cache
def _reference_of(encoded: bytes) -> RankCapture:
    from holdfast.trainer.check.reference import run_reference

    return run_reference(convert_config(msgspec.json.decode(encoded)))


def run_in(
    cluster: Any, config: RunConfig, root: Path, *, timeout_s: float = 90.0, **arguments: Any
) -> None:
    """Train `config` on the pool in a run's folder. Arguments as of `train_in`."""
    cluster.run(
        "support.runs.small_runs:train_in",
        world_size_of(config),
        timeout_s=timeout_s,
        config=msgspec.to_builtins(config),
        root=str(root),
        **arguments,
    )


def check_layout(rank: int, world_size: int, store: Store, *, config: dict, bug: str = "") -> Any:
    """What one rank of a checked layout saw, with a bug put in first if one is named."""
    from holdfast.trainer.check.layout_run import run_layout
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    if not bug:
        return run_layout(run_config, local_world(rank, world_size), store)
    from support.oracles import bugs, expert_bugs, multi_token_bugs, slice_bugs

    modules = (slice_bugs, expert_bugs, multi_token_bugs, bugs)
    known = {name: value for module in modules for name, value in vars(module).items()}
    with known[bug]():
        return run_layout(run_config, local_world(rank, world_size), store)
