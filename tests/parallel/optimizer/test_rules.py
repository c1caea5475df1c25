"""An optimizer is one rule and one line of the registry: what keeps its state follows from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.distributed import Store

from holdfast.checkpoint.stores.registry import read_manifest
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.optimizer.rules.registry import OPTIMIZERS
from holdfast.parallel.optimizer.rules.rule import BlockUpdate, OptimizerRule, OwnKey, StateKind
from holdfast.trainer.check.reference import run_reference
from holdfast.trainer.config import RunConfig, check_config, dump_toml, load_config
from holdfast.trainer.plan_report import plan_report
from support.processes.cluster import Cluster
from support.runs import small_runs
from support.runs.small_runs import events_of, make_config, metrics_of, world_size_of

STEPS = 6


def _update(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: tuple[float, float]
) -> None:
    decay, kept = settings
    for update in updates:
        [momentum] = update.state
        momentum.mul_(kept).add_(update.gradient)
        if update.decays:
            update.master.mul_(1.0 - lr * decay)
        update.master.sub_(momentum.sign(), alpha=lr)


class _Reference(torch.optim.Optimizer):
    """The same, parameter by parameter."""

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                before = state.get("momentum", torch.full_like(parameter, 1e-3))
                state["momentum"] = group["kept"] * before + parameter.grad
                decayed = parameter.data * (1.0 - group["lr"] * group["weight_decay"])
                parameter.data = decayed - group["lr"] * torch.sign(state["momentum"])


def _reference(
    groups: Sequence[tuple[list[nn.Parameter], bool]], settings: tuple[float, float]
) -> _Reference:
    decay, kept = settings
    found = [{"params": p, "weight_decay": decay if decays else 0.0} for p, decays in groups]
    return _Reference(found, {"lr": 0.0, "kept": kept})


def _problems(section: Any) -> Iterator[str]:
    if not 0 <= section.momentum < 1:
        yield f"optimizer.momentum = {section.momentum}: must be at least 0 and less than 1"


SIGN = OptimizerRule(
    name="sign-momentum",
    kinds=(StateKind("momentum", initial=1e-3),),
    settings=lambda section: (section.weight_decay, section.momentum),
    update_blocks=_update,
    reference=_reference,
    own_keys=(OwnKey("momentum", float, 0.9),),
    problems=_problems,
)


def _update_without_state(
    updates: Sequence[BlockUpdate], step: Tensor, lr: float, decay: float
) -> None:
    for update in updates:
        update.master.sub_(update.gradient.sign(), alpha=lr * float(step))


STATELESS = OptimizerRule(
    name="sign",
    kinds=(),
    settings=lambda section: section.weight_decay,
    update_blocks=_update_without_state,
    reference=_reference,
)
"""Its updates grow with their number, so that a lost count is seen."""


@contextmanager
def registered() -> Iterator[None]:
    rules = {rule.name: rule for rule in (SIGN, STATELESS)}
    with mock.patch.dict(OPTIMIZERS, rules):  # type: ignore[arg-type]
        yield


def config(
    train: dict[str, Any] | None = None, name: str = SIGN.name, **parallel: int
) -> RunConfig:
    own = {"momentum": 0.8} if name == SIGN.name else {}
    with registered():
        return make_config(
            model={"layers": 2, "dropout": 0.0},
            train={"steps": STEPS, "global_batch": 4, **(train or {})},
            optimizer={"name": name, "lr": 1e-3, **own},
            parallel=dict(parallel),
        )


def with_rule(rank: int, world_size: int, store: Store, *, job: str, **arguments: Any) -> Any:
    """A job of small_runs where the rule is registered."""
    with registered():
        return getattr(small_runs, job)(rank, world_size, store, **arguments)


def run(cluster: Cluster, job: str, wanted: RunConfig, **arguments: Any) -> list[Any]:
    plain = msgspec.to_builtins(wanted)
    ranks = world_size_of(wanted)
    return cluster.run(f"{__name__}:with_rule", ranks, job=job, config=plain, **arguments)


@pytest.fixture(scope="module")
def alone(cluster: Cluster) -> dict[str, Any]:
    [found] = run(cluster, "train_steps", config())
    assert len(set(found["losses"])) == STEPS
    return found


def test_the_registry_says_which_names_a_configuration_may_give() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name = 'sign-momentum'.*'adamw'"):
        check_config(config())
    with registered():
        check_config(config())


def test_an_optimizer_brings_its_own_keys_and_rules(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(dump_toml(config()))
    with registered():
        assert load_config(path) == config()
        assert load_config(path).optimizer.momentum == 0.8  # type: ignore[attr-defined]
        for override, said in (
            ("optimizer.momentum=1", "optimizer.momentum = 1.0: must be at least 0 and less than"),
            ("optimizer.momentum=much", "optimizer.momentum = 'much': expected `float`"),
            ("optimizer.momentun=0.5", "did you mean optimizer.momentum?"),
            ("optimizer.name=adamw", "optimizer.momentum is not a key"),
        ):
            with pytest.raises(ConfigError) as caught:
                load_config(path, [override])
            assert said in str(caught.value)


def test_the_memory_estimate_counts_the_kinds_of_the_rule() -> None:
    adamw = msgspec.structs.replace(
        config(), optimizer=msgspec.structs.replace(config().optimizer, name="adamw")
    )
    with registered():
        small, large = plan_report(config()), plan_report(adamw)
    # Reduced gradient and momentum; reduced gradient and two moments.
    assert 3 * small.memory[0].optimizer == 2 * large.memory[0].optimizer
    assert small.checkpoint_bytes == small.parameters * 8
    assert large.checkpoint_bytes == large.parameters * 12


@pytest.mark.mp
def test_a_new_rule_trains_to_the_same_bits_and_shadows_follow_it(
    cluster: Cluster, alone: dict[str, Any]
) -> None:
    for found in run(cluster, "train_with_shadows", config(data=2)):
        assert found == (alone["losses"], alone["digest"], True, 0)


@pytest.mark.mp
def test_the_state_of_a_new_rule_is_saved_and_goes_on_in_another_layout(
    cluster: Cluster, alone: dict[str, Any], tmp_path: Path
) -> None:
    run(cluster, "train_in", config({"stop_after": 3}, data=2), root=str(tmp_path))
    manifest = read_manifest(tmp_path / "checkpoints" / "step-00000003")
    assert {entry.kind for entry in manifest.tensors.values()} == {"weight", "momentum"}
    run(cluster, "train_in", config(pipeline=2), root=str(tmp_path))
    assert [line["loss_hex"] for line in metrics_of(tmp_path)] == alone["losses"]
    [finished] = events_of(tmp_path, "run_finished")
    assert finished["parameter_digest"] == alone["digest"], json.dumps(finished)


@pytest.mark.mp
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rule_without_state_goes_on_at_its_step(
    cluster: Cluster, tmp_path: Path, precision: str
) -> None:
    whole = config({"precision": precision}, name=STATELESS.name)
    run(cluster, "train_in", whole, root=str(tmp_path / "whole"))
    first = config({"precision": precision, "stop_after": 3}, name=STATELESS.name)
    run(cluster, "train_in", first, root=str(tmp_path / "halves"))
    run(cluster, "train_in", whole, root=str(tmp_path / "halves"))
    expected, found = (
        [(line["step"], line["loss_hex"]) for line in metrics_of(tmp_path / name)]
        for name in ("whole", "halves")
    )
    assert found == expected
    assert len(expected) == STEPS


@pytest.mark.parametrize("name", ["", "exp.avg", "a/b", "master"])
def test_a_kind_of_state_has_a_name_that_tensors_and_files_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        StateKind(name)


@pytest.mark.mp
def test_a_new_rule_is_checked_against_its_own_reference(cluster: Cluster) -> None:
    wide = config({"precision": "fp64"})
    with registered():
        reference = run_reference(wide)
    [found] = run(cluster, "train_steps", wide)
    losses = [float.fromhex(loss) for loss in found["losses"]]
    assert losses == pytest.approx(reference.losses, rel=1e-9)
