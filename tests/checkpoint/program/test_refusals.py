"""What cannot be saved exactly, and what a load finds no source or no place for, is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

from holdfast.checkpoint import Checkpointer, load, save
from holdfast.parallel.errors import CheckpointError, ConfigError


class Scaled(nn.Linear):
    """A module with extra state."""

    amax: Any = 1.0

    def get_extra_state(self) -> Any:
        return {"amax": self.amax}

    def set_extra_state(self, state: Any) -> None:
        self.amax = state["amax"]


class Packed(nn.Linear):
    """A module whose state_dict has something that is no parameter, buffer or extra state."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}absmax"] = torch.ones(1)


class Tagged(torch.Tensor):
    """A tensor with a class of its own, which a load would not give back."""


class Kept:
    def state_dict(self) -> dict[str, Any]:
        return {"deep": [object()]}


def _with_state(value: Any) -> dict[str, Any]:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters())
    optimizer.state[module.weight]["memory"] = value
    return {"model": module, "optimizer": optimizer}


def _with_group_value(value: Any) -> dict[str, Any]:
    module = nn.Linear(2, 2)
    return {
        "optimizer": torch.optim.SGD([{"params": module.parameters(), "f": value}]),
        "m": module,
    }


def _strange() -> dict[str, Any]:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters())
    optimizer.state[torch.zeros(7)]["x"] = 1
    return {"model": module, "optimizer": optimizer}


def _extra() -> dict[str, Any]:
    scaled = Scaled(2, 2)
    scaled.amax = lambda: 0
    return {"model": nn.Sequential(scaled)}


def _of(name: str) -> type:
    return type(name, (torch.optim.SGD,), {})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no dict": (lambda: nn.Linear(1, 1), "a state is a dict"),
    "a key that is no text": (lambda: {1: 2}, "has the key 1"),
    "half a surrogate pair": (lambda: {"\ud800": 2}, "has the key '.ud800'; .* Unicode"),
    "a tensor of a class of its own": (
        lambda: {"t": [torch.ones(1).as_subclass(Tagged)]},
        r"t\[0\] cannot be saved: it is a Tagged",
    ),
    "a meta module": (
        lambda: {"model": nn.Linear(3, 2, device="meta")},
        "weight cannot be .* meta device",
    ),
    "a lazy module": (lambda: {"model": nn.LazyLinear(2)}, "weight cannot .*no shape yet"),
    "a sparse tensor": (lambda: {"s": torch.eye(3).to_sparse()}, "s cannot be .* sparse"),
    "a sparse buffer": (lambda: {"m": {"s": torch.eye(3).to_sparse()}}, r"m\['s'\] cannot"),
    "a type that files lack": (lambda: {"c": torch.zeros(1, dtype=torch.complex128)}, "c cannot"),
    "a packed weight": (lambda: {"model": nn.Sequential(Packed(2, 2))}, "0.absmax cannot be"),
    "an object in a state_dict": (lambda: {"kept": Kept()}, r"kept\['deep'\]\[0\] cannot be saved"),
    "an object in extra state": (_extra, r"0._extra_state\['amax'\] cannot be saved"),
    "an object in an optimizer": (
        lambda: _with_state({"deep": object()}),
        r"optimizer.state\[weight\]\['memory'\]\['deep'\] cannot be saved",
    ),
    "a function in a group": (
        lambda: _with_group_value(len),
        r"optimizer.param_groups\[0\]\['f'\] cannot be saved",
    ),
    "state of a tensor in no group": (_strange, r"tensor of shape \[7\] that is in none"),
    "an optimizer without its module": (
        lambda: {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))])},
        "no module in the state has",
    ),
    "modules in a list": (lambda: {"list": [nn.Linear(1, 1)]}, r"list\[0\] .* a key of its own"),
    "a spread optimizer": (
        lambda: {"o": _of("ZeroRedundancyOptimizer")([nn.Parameter(torch.zeros(2))])},
        "o is a ZeroRedundancyOptimizer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_leaf_that_cannot_be_saved_exactly_is_named_before_anything_is_written(
    tmp_path: Path, case: str
) -> None:
    make, said = REFUSED[case]
    with pytest.raises(CheckpointError, match=said):
        save(tmp_path / "none", make())
    assert not (tmp_path / "none").exists()


def _program(seed: int = 0, width: int = 3) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def _other_groups() -> dict[str, Any]:
    state = _program()
    first, *rest = state["model"].parameters()
    state["optimizer"] = torch.optim.AdamW([{"params": [first]}, {"params": rest}])
    return state


def _further_parameter() -> dict[str, Any]:
    state = _program()
    parameter = state["optimizer"].param_groups[0]["params"].pop(0)
    del state["optimizer"].state[parameter]
    return state


UNLOADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "a key": (lambda: {**_program(), "best": 0.0}, "has nothing for best"),
    "a module": (lambda: {"ema": nn.Linear(2, 3)}, "has no module ema; it has model, optimizer"),
    "an optimizer": (
        lambda: {**_program(), "second": torch.optim.SGD([nn.Parameter(torch.zeros(1))])},
        "has nothing for second",
    ),
    "a smaller tensor": (lambda: _program(width=2), r"\[2, 2\], and the checkpoint's .* \[3, 2\]"),
    "a larger tensor": (lambda: _program(width=4), r"\[4, 2\], and the checkpoint's .* \[3, 2\]"),
    "a parameter that is missing": (
        lambda: {"model": nn.Sequential(*_program()["model"], nn.Linear(2, 2))},
        "lacks 2.weight, 2.bias, which model needs",
    ),
    "a parameter too many": (
        lambda: {"model": nn.Sequential(nn.Linear(2, 3))},
        "has 1.weight, 1.bias for model, which model has no place for",
    ),
    "extra state": (lambda: {"model": nn.Sequential(Scaled(2, 3))}, "lacks 0._extra_state"),
    "other groups": (_other_groups, "optimizer has 2 param_groups, and .* has 1"),
    "a parameter that the optimizer lacks": (
        _further_parameter,
        "has 0.weight for optimizer, which optimizer has no place for",
    ),
    "another type": (
        lambda: {"model": torch.zeros(2)},
        "model is a Tensor, .* the state of a module",
    ),
    "a dtype": (lambda: {"model": _program()["model"].double()}, "dtype F32, and F64 is needed"),
}


@pytest.mark.parametrize("case", UNLOADABLE)
def test_a_load_names_what_has_no_source_or_no_place_and_changes_nothing(
    tmp_path: Path, case: str
) -> None:
    save(tmp_path, _program())
    make, said = UNLOADABLE[case]
    state = make()
    before = {
        k: copy.deepcopy(v.state_dict()) for k, v in state.items() if hasattr(v, "state_dict")
    }
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path, state)
    for key, value in before.items():
        assert str(state[key].state_dict()) == str(value)


def test_what_may_be_absent_is_named_one_by_one_or_by_a_pattern(tmp_path: Path) -> None:
    """A backbone with a new head takes what there is; another shape is never allowed."""
    saved = _program()
    save(tmp_path, saved)
    state: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"new": nn.Linear(3, 5)}))
    }
    head = copy.deepcopy(state["model"][1])
    with pytest.raises(CheckpointError, match=r"lacks 1.new.weight, 1.new.bias, .* `allow`"):
        load(tmp_path, state, allow=["1.weight", "1.bias"])
    with pytest.raises(CheckpointError, match=r"has 1.weight, 1.bias .* `allow`"):
        load(tmp_path, state, allow=["1.new.*"])
    with Checkpointer(tmp_path, state) as checkpointer:
        assert checkpointer.load(allow=["1.*"]) == 0
    assert torch.equal(state["model"][0].weight, saved["model"][0].weight)
    assert str(state["model"][1].state_dict()) == str(head.state_dict())
    optimizer = torch.optim.AdamW(state["model"].parameters())
    with pytest.raises(CheckpointError, match=r"optimizer lacks 1.new.weight"):
        load(tmp_path, {**state, "optimizer": optimizer}, allow="1.*")
    with pytest.raises(CheckpointError, match=r"\[4, 2\].* a tensor is loaded whole"):
        load(tmp_path, {"model": nn.Sequential(nn.Linear(2, 4))}, allow="*")


def test_a_state_dict_is_loaded_where_one_was_saved(tmp_path: Path) -> None:
    """As with torch: what comes back is given to load_state_dict; modules are another thing."""
    saved, again = _program(), _program(1)
    save(tmp_path / "dicts", {key: value.state_dict() for key, value in saved.items()})
    with pytest.raises(CheckpointError, match="what was saved as a state_dict is loaded as one"):
        load(tmp_path / "dicts", {"model": again["model"]})
    found = load(tmp_path / "dicts", {key: value.state_dict() for key, value in again.items()})
    for key, value in again.items():
        value.load_state_dict(found[key])
        assert str(value.state_dict()) == str(saved[key].state_dict())
    save(tmp_path / "objects", saved)
    for key, kind in (("model", "a module"), ("optimizer", "an optimizer")):
        with pytest.raises(CheckpointError, match=f"checkpoint's {key} is the state of {kind}"):
            load(tmp_path / "objects", {key: again[key].state_dict()})


def test_a_url_is_refused_when_the_checkpointer_is_made(tmp_path: Path) -> None:
    """A load that found nothing in a folder of that name would begin the program anew."""
    for url in ("s3://bucket/run", "memory://run"):
        with pytest.raises(ConfigError, match=f"folder = '{url}'"):
            Checkpointer(url, {"a": 1})
    target = fsspec.filesystem("memory")
    folder = save(tmp_path, {"a": torch.ones(2), "b": 3})
    target.put(str(folder), "/run/step-00000000", recursive=True)
    state = {"a": torch.zeros(2)}
    assert load("memory://run", state) == {"a": state["a"], "b": 3}
    assert torch.equal(state["a"], torch.ones(2))


def test_an_arena_that_this_machine_cannot_have_is_told_in_a_line(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, {"a": torch.ones(2)}, arena_bytes=1 << 62)
    with pytest.raises(CheckpointError, match=r"an arena of [\d,]+ bytes"):
        checkpointer.save(1)


def test_a_group_value_without_a_source_is_named(tmp_path: Path) -> None:
    save(tmp_path, _program())
    state = _program()
    state["optimizer"].param_groups[0]["layer"] = 3
    with pytest.raises(CheckpointError, match=r"lacks optimizer.param_groups\[0\]\['layer'\]"):
        load(tmp_path, state)


def test_less_may_be_asked_for_than_the_checkpoint_has(tmp_path: Path) -> None:
    """An evaluation takes the model alone; plain values come back though nothing asks for them."""
    program = _program()
    save(tmp_path, {**program, "best": float("inf")})
    again = _program(1)["model"]
    assert load(tmp_path, {"model": again}) == {"best": float("inf")}
    assert torch.equal(again[0].weight, program["model"][0].weight)


def test_modules_with_equal_names_and_two_optimizers_of_one_module_load(tmp_path: Path) -> None:
    def state(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        model.add_module("ema", nn.Sequential(nn.Linear(2, 2)))
        ema, other = copy.deepcopy(model), nn.Sequential(nn.Linear(2, 2))
        found = {"model": model, "ema": other, "copy": ema, "exp_avg": copy.deepcopy(model)}
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1 + seed) for m in found.values()]
        optimizers.append(torch.optim.AdamW(model.parameters(), lr=0.2 + seed))
        for parameter in (p for m in found.values() for p in m.parameters()):
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        return {**found, **{f"optimizer{n}": o for n, o in enumerate(optimizers)}}

    saved, again = state(0), state(1)
    save(tmp_path, saved)
    load(tmp_path, again)
    for key, value in saved.items():
        assert str(again[key].state_dict()) == str(value.state_dict()), key
    alone = state(2)["ema"]
    load(tmp_path, {"ema": alone})
    assert torch.equal(alone[0].weight, saved["ema"][0].weight)


def test_extra_state_numpy_and_nested_tensors_come_back(tmp_path: Path) -> None:
    scaled, loaded = Scaled(2, 2), Scaled(2, 2)
    scaled.amax = {"history": torch.arange(3.0), 3: (1, float("nan"))}
    module, again = nn.Sequential(scaled), nn.Sequential(loaded)
    array = np.arange(4, dtype=np.float16)
    generator = torch.Generator().manual_seed(4)
    torch.rand(3, generator=generator)
    weights = {"deep": [torch.ones(2), {"n": np.float64(0.1)}]}
    save(tmp_path, {"model": module, "array": array, "random": generator, "weights": weights})
    state: dict[str, Any] = {
        "model": again,
        "array": np.zeros(4, np.float16),
        "random": torch.Generator(),
        "weights": {"deep": [torch.zeros(2), {"n": None}]},
    }
    found = load(tmp_path, state)
    assert str(loaded.amax) == str(scaled.amax)
    assert np.array_equal(state["array"], array)
    assert torch.equal(torch.rand(3, generator=state["random"]), torch.rand(3, generator=generator))
    assert torch.equal(state["weights"]["deep"][0], torch.ones(2)), "tensors are filled in place"
    assert type(found["weights"]["deep"][1]["n"]) is np.float64


def test_an_optimizer_takes_the_state_that_was_saved_and_no_other(tmp_path: Path) -> None:
    """State that came after the save is gone after the load, as with load_state_dict."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save(tmp_path, {"model": model, "optimizer": optimizer})
    trained = _program()
    assert trained["optimizer"].state
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state
    load(tmp_path, {"model": model, "optimizer": optimizer})
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": -1}, "keep = -1"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"arena_bytes": -1}, "arena_bytes = -1"),
        ({"arena_bytes": "1G"}, "arena_bytes = '1G'"),
        ({"timeout_s": 0}, "timeout_s = 0"),
        ({"timeout_s": True}, "timeout_s = True"),
        ({"timeout_s": float("nan")}, "timeout_s = nan"),
    ],
)
def test_an_option_out_of_range_is_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        Checkpointer(tmp_path, {}, **options)


@pytest.mark.parametrize("step", [-1, 1.0, True, 2**63])
def test_a_step_that_is_none_is_refused(tmp_path: Path, step: Any) -> None:
    with Checkpointer(tmp_path, {"a": 1}) as checkpointer:
        with pytest.raises(CheckpointError, match="step = "):
            checkpointer.save(step)
        with pytest.raises(CheckpointError, match="step = "):
            checkpointer.load(step)


def test_results_stay_until_they_are_asked_for_and_nothing_follows_a_close(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, {"a": torch.ones(2)})
    checkpointer.save(1, wait=True)
    checkpointer.save(2)
    checkpointer.wait()
    checkpointer.save(3)
    checkpointer.close()
    checkpointer.close()
    assert [(r.step, r.error) for r in checkpointer.results()] == [(1, ""), (2, ""), (3, "")]
    assert checkpointer.results() == []
    for call in (lambda: checkpointer.save(4), checkpointer.load, checkpointer.wait):
        with pytest.raises(CheckpointError, match="is closed"):
            call()


def test_a_failed_save_is_told_at_the_latest_when_the_checkpointer_closes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    checkpointer = Checkpointer(tmp_path / "file" / "folder", {"a": torch.ones(2)})
    checkpointer.save(1)
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        checkpointer.close()
