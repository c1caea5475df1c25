"""An optimizer of any kinds of state goes through every format, or is named as left out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from torch import Tensor
from torch.distributed import Store

from holdfast.checkpoint import save
from holdfast.checkpoint.format.kinds import STEP, TENSOR, UNPREFIXED_KINDS
from holdfast.checkpoint.stores.registry import find_checkpoint
from holdfast.checkpoint.tools import diff_checkpoints, inspect_checkpoint, rebuild_manifest
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.optimizer.rules.registry import OPTIMIZERS
from holdfast.parallel.optimizer.rules.rule import MASTER, BlockUpdate, OptimizerRule, StateKind
from support.foreign.conversions import assert_equal, converted, tensors_of
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, train_in
from support.runs.tiny_models import make_model

KINDS = ("slow", "fast", "peak")
STEPS = 2


def _update(updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: None) -> None:
    for update in updates:
        slow, fast, peak = update.state
        slow.lerp_(update.gradient, 0.1)
        fast.lerp_(update.gradient, 0.5)
        torch.maximum(peak, update.gradient.abs(), out=peak)
        update.master.sub_((slow + fast) / (peak + 1e-6), alpha=lr)


def _reference(groups: Any, settings: None) -> torch.optim.Optimizer:
    raise NotImplementedError("no test asks for it")


THREE = OptimizerRule(
    name="three-kinds",
    kinds=tuple(map(StateKind, KINDS)),
    settings=lambda section: None,
    update_blocks=_update,
    reference=_reference,
)


@contextmanager
def registered() -> Iterator[None]:
    with mock.patch.dict(OPTIMIZERS, {THREE.name: THREE}):  # type: ignore[arg-type]
        yield


def train_with_rule(rank: int, world_size: int, store: Store, **arguments: Any) -> None:
    with registered():
        train_in(rank, world_size, store, **arguments)


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By precision: the last checkpoint of a run with the rule."""
    found = {}
    for precision in ("fp32", "bf16"):
        root = tmp_path_factory.mktemp(precision)
        config = make_config(
            model={"layers": 2, "dropout": 0.0},
            train={"steps": STEPS, "global_batch": 4, "precision": precision},
            optimizer={"name": THREE.name, "lr": 1e-3},
        )
        plain = msgspec.to_builtins(config)
        cluster.run(f"{__name__}:train_with_rule", 1, config=plain, root=str(root))
        found[precision] = root / f"checkpoints/step-{STEPS:08d}"
    return found


@pytest.mark.mp
@pytest.mark.parametrize("known", [True, False], ids=["registered", "unregistered"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("to", "values"),
    [
        ("holdfast", {}),
        ("dcp", {}),
        ("deepspeed-universal", {}),
        ("megatron", {}),
        ("megatron", {"distributed_optimizer": 0}),
        ("megatron-legacy", {"tensor": 2, "pipeline": 2}),
        ("megatron-legacy", {"transformer_engine": 0}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_every_kind_comes_back(
    runs: dict[str, Path],
    tmp_path: Path,
    to: str,
    values: dict[str, int],
    precision: str,
    known: bool,
) -> None:
    source = runs[precision]
    expected = tensors_of(source)
    kinds = {entry.kind for entry in find_checkpoint(source).manifest().tensors.values()}
    assert kinds == {"weight", *KINDS, *([MASTER] if precision == "bf16" else [])}
    assert all(bool(value.any()) for name, value in expected.items() if name.startswith(KINDS))
    with mock.patch.dict(OPTIMIZERS, {THREE.name: THREE} if known else {}):  # type: ignore[arg-type]
        there = converted(source, tmp_path / "there", to, values=values)
        back = converted(tmp_path / "there", tmp_path / "back", "holdfast")
    # Settings that the format has no words for are told; no tensor is left out.
    assert {*there.left_out, *back.left_out} <= {"param_groups"}
    assert back.step == STEPS
    assert find_checkpoint(tmp_path / "back").manifest().scalars["optimizer_step"] == STEPS
    found = tensors_of(tmp_path / "back")
    # DCP counts updates by parameter, as torch's optimizers do.
    assert_equal({n: v for n, v in found.items() if not n.startswith("step.")}, expected)


@pytest.mark.mp
def test_a_folder_of_weights_names_every_kind_that_it_leaves_out(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    done = converted(runs["bf16"], tmp_path / "hf", "hf")
    others = {name for name in tensors_of(runs["bf16"]) if name.startswith((*KINDS, MASTER))}
    assert set(done.left_out) == {*others, "tokenizer.json"}  # its data is synthetic
    assert len(others) == (len(KINDS) + 1) * done.tensors["weight"]
    wide = converted(runs["bf16"], tmp_path / "wide", "hf", dtype="F32")
    named = {name for name in wide.left_out if name != "tokenizer.json"}
    assert named == {name for name in others if not name.startswith(MASTER)}


@pytest.mark.mp
def test_the_tools_tell_of_every_kind(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs["bf16"], tmp_path / "copy")
    counts = {kind: told["tensors"] for kind, told in inspect_checkpoint(copy).kinds.items()}
    assert counts.keys() == {"weight", MASTER, *KINDS}
    assert len(set(counts.values())) == 1
    (copy / "manifest.json").unlink()
    rebuild_manifest(copy)
    found = diff_checkpoints(runs["bf16"], copy)
    assert (found.equal, found.compared) == (True, sum(counts.values()))


class Mixed(torch.optim.Optimizer):
    """Keeps what other programs' optimizers do: states by element, by row, in whole numbers."""

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.tensor(1.0),
                    "momentum_buffer": torch.randn_like(parameter),
                    "param": torch.randn_like(parameter),
                    "fp32": torch.randn_like(parameter),
                    "row": torch.randn(parameter.shape[:1]) if parameter.dim() > 1 else None,
                    "seen": torch.ones_like(parameter, dtype=torch.int64),
                }


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a program of its own, with the config.json of its model beside it."""
    root = tmp_path_factory.mktemp("program")
    model = make_model("Llama", root / "hf")
    optimizer = Mixed(model.parameters(), {"lr": 1e-3})
    optimizer.step()
    save(root / "ours", {"model": model, "optimizer": optimizer}, step=1)
    return root


@pytest.mark.parametrize(
    ("to", "left_out"),
    [
        ("dcp", ()),
        # By DeepSpeed's own names: the count, and master copies, which "fp32" would be read as.
        ("deepspeed-universal", ("step", "row", "seen", "fp32")),
        ("megatron", ("step", "row", "seen", "param")),
    ],
)
def test_a_kind_that_a_format_cannot_hold_is_named(
    program: Path, tmp_path: Path, to: str, left_out: tuple[str, ...]
) -> None:
    expected = tensors_of(program / "ours")
    files = {"model_files": program / "hf"}
    there = converted(program / "ours", tmp_path / "there", to, **files)
    back = converted(tmp_path / "there", tmp_path / "back", "holdfast")
    lost = {name for name in expected if name.partition(".")[0] in left_out}
    reasons = {name: why for name, why in there.left_out.items() if name != "param_groups"}
    assert reasons.keys() == lost
    assert all(name.partition(".")[0] in why for name, why in reasons.items())
    assert back.left_out == {}
    assert_equal(
        tensors_of(tmp_path / "back"), {n: v for n, v in expected.items() if n not in lost}
    )


def test_states_of_some_weights_are_refused_where_all_have_them(
    program: Path, tmp_path: Path
) -> None:
    model = make_model("Llama", tmp_path / "hf")
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=0.1, momentum=0.9)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    optimizer.step()
    save(tmp_path / "ours", {"model": model, "optimizer": optimizer}, step=1)
    files = {"model_files": tmp_path / "hf"}
    with pytest.raises(CheckpointError, match=r"has momentum_buffer of some weights, and none of"):
        converted(tmp_path / "ours", tmp_path / "there", "megatron", **files)
    with pytest.raises(CheckpointError, match=r"has momentum_buffer of some weights, and none of"):
        converted(tmp_path / "ours", tmp_path / "there", "megatron-legacy", **files)


def test_no_optimizer_keeps_state_under_a_name_that_checkpoints_have_for_something_else() -> None:
    taken = {*UNPREFIXED_KINDS, MASTER, STEP}
    assert TENSOR in taken
    for rule in OPTIMIZERS.values():
        assert not taken & {kind.name for kind in rule.kinds}, rule.name
