"""A compiled model: one layout has the bits of all, and what cannot be compiled is said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from torch import Tensor
from torch.distributed import Store

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import check_config, convert_config
from holdfast.trainer.config.loading import dump_toml
from holdfast.trainer.run.resume import WORTH_SAYING
from holdfast.trainer.terms import config_terms
from support.processes.cluster import Cluster
from support.runs import token_mlp
from support.runs.commands import holdfast
from support.runs.small_runs import make_config, world_size_of

COMPILER = "torch._inductor.compile_fx"
TRAIN = {"steps": 2, "global_batch": 4, "eval_batches": 1}


def train_and_evaluate(rank: int, world_size: int, store: Store, *, config: dict) -> dict[str, Any]:
    """A few steps and an evaluation: bits, what the ranks compare, and what was compiled later."""
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.terms import own_terms
    from holdfast.trainer.worlds.world import local_world

    run = convert_config(config)
    had_compiler = _has_compiler()
    certificate = own_terms(run, 0).certificate
    before = _graphs()
    training = open_training(run, local_world(rank, world_size), store)
    losses, norms = [], []
    for step in range(run.train.steps):
        training.compute(step)
        outcome = training.vote(*training.reduce())
        losses.append(outcome.loss.hex())
        norms.append(outcome.grad_norm.hex())
        training.apply(1e-2)
    training.finish_gather()
    return {
        "losses": losses,
        "norms": norms,
        "held out": [training.evaluate()["held_out"].hex()],
        "digest": training.parameter_digest(),
        "certificate": certificate.get("compiled passes"),
        "needs compiler": _has_compiler() and not had_compiler,
        "compiled later": _graphs() - before,
    }


def _has_compiler() -> bool:
    """Whether this process has imported torch's compiler."""
    return COMPILER in sys.modules


def _graphs() -> int:
    """How many graphs this process has compiled."""
    tracing = sys.modules.get("torch._dynamo.utils")
    return tracing.counters["stats"]["unique_graphs"] if tracing else 0


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Cluster]:
    """Two processes that have compiled nothing yet, and find nothing compiled. The compiler is
    imported once for both.
    """
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # a trial compilation takes as long as four kernels
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of processes before ranks are forked
    }
    pool = Cluster(2, imports=[COMPILER], environment=variables)
    yield pool
    pool.close()


@pytest.mark.mp
@pytest.mark.slow
def test_compiled_layouts_have_the_same_bits_and_compile_before_ranks_are_connected(
    cluster: Cluster, pool: Cluster, tmp_path: Path
) -> None:
    def run(
        on: Cluster = pool, offload: dict[str, Any] | None = None, **keys: Any
    ) -> dict[str, Any]:
        train = {name: keys.pop(name) for name in ("compile", "recompute") if name in keys}
        config = make_config(
            model={"layers": 2},
            train={**TRAIN, "compile": True, **train},
            parallel=keys,
            offload=offload or {},
        )
        job = "test_compiled_regions:train_and_evaluate"
        plain = msgspec.to_builtins(config)
        first, *others = on.run(job, world_size_of(config), timeout_s=300, config=plain)
        assert all(other == first for other in others)
        return first

    plain = run(cluster, compile=False)
    assert not plain["needs compiler"]  # it would take a second of every start
    away = {"activations": "ssd", "path": str(tmp_path), "smallest_kib": 1, "least_share": 1.0}
    replicas = run(data=2, shard="parameters", offload=away)  # both begin with nothing compiled
    assert replicas["certificate"]
    assert replicas["compiled later"] == 0
    assert run() == replicas
    assert run(pipeline=2, schedule="zb-h1") == replicas
    assert run(pipeline=2, recompute="full") == replicas
    assert run(recompute="selective") == replicas
    assert replicas["digest"] != plain["digest"]  # the key is one that fixes the bits
    for name in ("losses", "norms", "held out"):
        near = [float.fromhex(value) for value in replicas[name]]
        assert near == pytest.approx([float.fromhex(value) for value in plain[name]], rel=1e-5)


def called_regions(
    rank: int, world_size: int, store: Store, *, config: dict
) -> tuple[list[str], list[str]]:
    """The calls that a rank compiles before it trains, and those of a step and an evaluation."""
    from holdfast.trainer.models import compilation
    from holdfast.trainer.step.build import compile_model, open_training
    from holdfast.trainer.worlds.world import local_world

    calls: set[str] = set()

    def noting(function: Callable[..., Tensor], threads: int) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            shown = [
                (type(a).__name__, tuple(a.shape), a.stride(), a.dtype, a.requires_grad)
                if isinstance(a, Tensor)
                else a
                for a in arguments
            ]
            calls.add(f"{function.__name__}{shown} {torch.is_grad_enabled()} {threads}")
            return function(*arguments)

        return call

    run = convert_config(config)
    with mock.patch.object(compilation, "_compiled", noting):
        compile_model(run, torch.device("cpu"))
        before = sorted(calls)
        training = open_training(run, local_world(rank, world_size), store)
        calls.clear()
        training.compute(0)
        training.vote(*training.reduce())
        training.evaluate()
    return before, sorted(calls)


@pytest.mark.mp
@pytest.mark.parametrize(
    ("model", "sequence_parallel"),
    [({}, True), ({}, False), ({"family": "gpt2", "kv_heads": 0}, True)],
)
def test_every_shape_of_a_tensor_group_is_compiled_beforehand_on_all_of_its_ranks(
    cluster: Cluster, model: dict[str, Any], sequence_parallel: bool
) -> None:
    config = make_config(
        model={"layers": 2, "intermediate": 49, **model},
        train={**TRAIN, "compile": True, "precision": "bf16"},
        parallel={"tensor": 2, "pipeline": 2, "sequence_parallel": sequence_parallel},
    )
    ranks = cluster.run(
        "test_compiled_regions:called_regions",
        world_size_of(config),
        config=msgspec.to_builtins(config),
    )
    expected = ranks[0][0]
    assert len(expected) == 2 * 4  # of the uneven parts of an MLP, two gates
    assert all(before == expected for before, _ in ranks)
    assert {call for _, calls in ranks for call in calls} == set(expected)


@pytest.mark.mp
def test_a_rank_that_cannot_compile_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(dump_toml(make_config(train={**TRAIN, "compile": True})))
    monkeypatch.setenv("CXX", "/not/there/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = holdfast(tmp_path, "train", "run.toml", "--out", "run", timeout_s=240)
    said = [line for line in done.stderr.splitlines() if "compile" in line]
    assert done.returncode == 2, done.stderr
    assert "train.compile = true: torch cannot compile on this machine" in said[0]
    assert "'/not/there/g++'" in said[0]
    assert "or set train.compile = false" in said[0]
    assert "Traceback" not in done.stderr


def test_compilation_is_a_term_of_a_run_and_is_said_when_it_changes() -> None:
    assert config_terms(make_config(train={"compile": True}))["train.compile"] == "true"
    assert "train.compile" in WORTH_SAYING


def test_a_family_without_compiled_parts_is_refused() -> None:
    with token_mlp.registered():
        config = convert_config(
            {
                "model": {"family": "token-mlp", "layers": 1, "hidden": 8, "vocab": 11},
                "train": {"compile": True},
            }
        )
        with pytest.raises(ConfigError, match="'token-mlp' has nothing to compile; set it to fal"):
            check_config(config)
