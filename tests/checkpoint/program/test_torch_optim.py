"""Leaf by leaf against torch.save and torch.load: every optimizer and schedule that torch has."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules, swa_utils

from holdfast.checkpoint import load, save
from support.oracles.exact_form import form_of

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if kind is not torch.optim.Optimizer
)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adam": [{"amsgrad": True}, {"fused": True}, {"lr": torch.tensor(1e-3)}],
    "AdamW": [{"lr": torch.tensor(1e-3, requires_grad=True)}, {"lr": torch.tensor(2e-3).double()}],
    "Adagrad": [{"initial_accumulator_value": 0.5}],
    "LBFGS": [{"line_search_fn": "strong_wolfe"}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "maximize": True}],
}
CASES = [
    *((name, {}) for name in OPTIMIZERS),
    *((name, options) for name, listed in OPTIONS.items() for options in listed),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": schedules.ConstantLR,
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LinearLR": schedules.LinearLR,
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 3, 3]),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
    "PolynomialLR": schedules.PolynomialLR,
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)], [2]
    ),
    "StepLR": lambda o: schedules.StepLR(o, 2),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05),
}


def _module(name: str, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if name == "SparseAdam":
        return nn.Embedding(5, 3, sparse=True)
    module = nn.Sequential(nn.Linear(3, 4, bias=name != "Muon"), nn.Linear(4, 2, bias=False))
    if name != "Muon":
        module.register_parameter("scalar", nn.Parameter(torch.tensor(0.5)))
    return module.to(dtype)


def _optimizer(name: str, module: nn.Module, options: dict[str, Any]) -> Any:
    return getattr(torch.optim, name)(module.parameters(), **copy.deepcopy(options))


def _train(module: nn.Module, optimizer: Any, schedule: Any, steps: int) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        if isinstance(module, nn.Embedding):
            value = module(torch.tensor([0, 2])).square().mean()
        else:
            parameter = next(module.parameters())
            value = module(torch.ones(2, 3, dtype=parameter.dtype)).square().mean()
            if hasattr(module, "scalar"):
                value = value * module.scalar
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)
        if isinstance(schedule, schedules.ReduceLROnPlateau):
            schedule.step(1.0)
        elif schedule is not None:
            schedule.step()


def _by_torch(state: dict[str, Any]) -> Any:
    """What torch.save and torch.load make of the state dicts."""
    file = io.BytesIO()
    torch.save({key: value.state_dict() for key, value in state.items()}, file)
    file.seek(0)
    return form_of(torch.load(file, weights_only=False))


def _program(name: str, options: dict[str, Any], dtype: torch.dtype, schedule: str, seed: int):
    module = _module(name, dtype, seed)
    optimizer = _optimizer(name, module, options)
    state: dict[str, Any] = {"model": module, "optimizer": optimizer}
    if schedule:
        state["schedule"] = SCHEDULES[schedule](optimizer)
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_every_leaf_of_every_optimizer_comes_back_as_torch_load_gives_it(
    tmp_path: Path, name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    if name == "LBFGS" and dtype == torch.bfloat16 and options:
        pytest.skip("torch's line search has no bfloat16")
    state = _program(name, options, dtype, "", 0)
    _train(state["model"], state["optimizer"], None, 3)
    save(tmp_path, state)
    again = _program(name, options, dtype, "", 1)
    load(tmp_path, again)
    assert form_of({k: v.state_dict() for k, v in again.items()}) == _by_torch(state)
    _train(state["model"], state["optimizer"], None, 2)
    _train(again["model"], again["optimizer"], None, 2)
    for key in state:
        assert form_of(again[key].state_dict()) == form_of(state[key].state_dict()), key


def test_no_schedule_of_torch_is_left_out() -> None:
    known = {
        name
        for name, kind in vars(schedules).items()
        if isinstance(kind, type) and issubclass(kind, schedules.LRScheduler) and name[0] != "_"
    }
    assert known - {"LRScheduler"} == SCHEDULES.keys() - {"SWALR"}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_leaf_of_every_schedule_comes_back_as_torch_load_gives_it(
    tmp_path: Path, schedule: str, lr: Any
) -> None:
    state = _program("SGD", {"lr": lr}, torch.float32, schedule, 0)
    _train(state["model"], state["optimizer"], state["schedule"], 3)
    save(tmp_path, state)
    again = _program("SGD", {"lr": lr}, torch.float32, schedule, 1)
    load(tmp_path, again)
    assert form_of({k: v.state_dict() for k, v in again.items()}) == _by_torch(state)
    for parts in (state, again):
        _train(parts["model"], parts["optimizer"], parts["schedule"], 4)
    for key in state:
        assert form_of(again[key].state_dict()) == form_of(state[key].state_dict()), key


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=3),
    st.floats().map(lambda value: torch.tensor(value, dtype=torch.float64)),
    st.floats(width=32).map(lambda value: torch.tensor([value, -0.0], dtype=torch.bfloat16)),
    st.integers(0, 3).map(lambda n: torch.zeros(n, 2, dtype=torch.int64)),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    state=st.dictionaries(st.text(max_size=5), TREES, max_size=3),
    more=TREES,
    group=st.dictionaries(st.text(min_size=1, max_size=4).filter("params".__ne__), TREES),
    value=TREES,
)
def test_whatever_an_optimizer_of_ones_own_keeps_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    state: dict[str, Any],
    more: Any,
    group: dict[str, Any],
    value: Any,
) -> None:
    folder = tmp_path_factory.mktemp("own")
    module = nn.Linear(2, 2)
    optimizer: Any = torch.optim.SGD([{"params": module.parameters(), **group}, {"params": []}])
    optimizer.state[module.weight] = state
    optimizer.state["of all"] = {"more": more}
    expected = form_of([optimizer.state_dict(), value])
    save(folder, {"model": module, "optimizer": optimizer, "value": value})
    again = nn.Linear(2, 2)
    other = torch.optim.SGD([{"params": again.parameters()}, {"params": []}], lr=5.0)
    found = load(folder, {"model": again, "optimizer": other, "value": None})
    assert form_of([other.state_dict(), found["value"]]) == expected
