"""Wrappers inside a model, hooks, names and places in memory change nothing that is saved."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard, _StridedShardOffsetMode

from holdfast.checkpoint import load, save
from holdfast.checkpoint.program.described import describe
from holdfast.checkpoint.program.tensors import _box_of
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box


def _trained(wrap: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(wrap(nn.Linear(2, 2)), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    torch.stack([parameter.sum() for parameter in model.parameters()]).sum().backward()
    optimizer.step()
    return model, optimizer


class Compiled(nn.Module):
    """A module that torch.compile has wrapped, as far as names go."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, Compiled])
def test_a_wrapper_inside_a_model_is_in_no_name(tmp_path: Path, wrap: Any) -> None:
    model, optimizer = _trained(wrap)
    save(tmp_path / "wrapped", {"model": model, "optimizer": optimizer})
    bare, other = _trained(lambda module: module)
    load(tmp_path / "wrapped", {"model": bare, "optimizer": other})
    pairs = zip(model.parameters(), bare.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    save(tmp_path / "bare", {"model": bare, "optimizer": other})
    load(tmp_path / "bare", {"model": model, "optimizer": optimizer})


class Cached(nn.Module):
    """A module whose own code takes part in load_state_dict."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.how, self.seen = how, 0.0
        if how == "post":
            self.register_load_state_dict_post_hook(self._note)
        if how == "pre":
            self.register_load_state_dict_pre_hook(self._note)

    def _note(self, module: Any, *rest: Any) -> None:
        values = rest[0]["weight"] if self.how == "pre" else self.weight.detach()
        self.seen = float(values[0])

    def _load_from_state_dict(self, state_dict: Any, *rest: Any) -> None:  # pyrefly: ignore
        super()._load_from_state_dict(state_dict, *rest)
        if self.how == "method":
            self._note(self)


@pytest.mark.parametrize("how", ["post", "pre", "method"])
def test_code_that_takes_part_in_a_load_of_torch_sees_what_was_loaded(
    tmp_path: Path, how: str
) -> None:
    module = Cached(how)
    with torch.no_grad():
        module.weight.fill_(3)
    save(tmp_path, {"model": module})
    other = Cached(how)
    load(tmp_path, {"model": other})
    assert other.seen == 3


def test_what_a_hook_adds_to_an_optimizers_state_comes_back(tmp_path: Path) -> None:
    state = dict(zip(("model", "optimizer"), _trained(lambda module: module), strict=True))
    seen: list[Any] = []

    def add(_: Any, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "decay": 0.5}

    def note(_: Any, found: dict[str, Any]) -> None:
        seen.append(found["decay"])

    state["optimizer"].register_state_dict_post_hook(add)
    state["optimizer"].register_load_state_dict_pre_hook(note)
    save(tmp_path, state)
    load(tmp_path, state)
    assert seen == [0.5]


def test_groups_in_another_order_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
    save(tmp_path, {"model": model, "optimizer": torch.optim.SGD(groups)})
    turned = torch.optim.SGD(groups[::-1])
    with pytest.raises(CheckpointError, match=r"param_groups\[0\] is param_groups\[1\] in"):
        load(tmp_path, {"model": model, "optimizer": turned})


def test_tensors_that_overlap_in_part_are_named_and_no_file_is_called_damaged(
    tmp_path: Path,
) -> None:
    save(tmp_path, {"a": torch.arange(9.0), "b": torch.arange(9.0) * 2})
    live = torch.zeros(20)
    with pytest.raises(CheckpointError, match=r"(a and b|b and a) overlap in this program's"):
        load(tmp_path, {"a": live[:9], "b": live[5:14]})
    load(tmp_path, {"a": live[:9], "b": live[9:18]})
    assert torch.equal(live[9:18], torch.arange(9.0) * 2)
    with pytest.raises(CheckpointError, match="overlap in this program's memory"):
        load(tmp_path, {"a": live[:18:2], "b": live[4:13]})
    load(tmp_path, {"a": live[:18:2], "b": live[1:18:2]})
    assert torch.equal(live[:18:2] * 2, live[1:18:2])


def test_tensors_that_overlap_and_agree_are_loaded(tmp_path: Path) -> None:
    saved = torch.arange(12, dtype=torch.bfloat16)
    saved[5] = float("nan")
    save(tmp_path, {"whole": saved, "rows": saved.view(3, 4), "part": saved[3:9]})
    live = torch.zeros(12, dtype=torch.bfloat16)
    load(tmp_path, {"whole": live, "rows": live.view(3, 4), "part": live[3:9]})
    assert torch.equal(live.view(torch.int16), saved.view(torch.int16))


def test_one_place_in_memory_takes_no_two_tensors_that_differ(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3), "b": torch.zeros(3), "c": torch.ones(3)})
    live = torch.full((3,), 9.0)
    with pytest.raises(CheckpointError, match="a and b are one tensor here"):
        load(tmp_path, {"a": live, "b": live})
    with pytest.raises(CheckpointError, match="a has several elements at one place"):
        load(tmp_path, {"a": torch.zeros(1).expand(3)})
    assert live.tolist() == [9.0] * 3
    load(tmp_path, {"a": live, "c": live})
    assert live.tolist() == [1.0] * 3


def test_no_name_is_a_files_own_key_or_another_ranks_name(tmp_path: Path) -> None:
    state = {"__metadata__": torch.ones(2), "x@1": torch.zeros(1)}
    names = [tensor.name for tensor in describe(state).tensors]
    assert not {"__metadata__", "x@1"} & set(names)
    [file] = save(tmp_path, state).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(names)
    fresh = {name: torch.full_like(value, 5) for name, value in state.items()}
    load(tmp_path, fresh)
    assert all(torch.equal(fresh[name], value) for name, value in state.items())


class _Mesh:
    def __init__(self, shape: tuple[int, ...], place: tuple[int, ...] | None) -> None:
        self.shape, self.place = shape, place

    def get_coordinate(self) -> tuple[int, ...] | None:
        return self.place


def _indices(extent: int, dim: int, mesh: _Mesh, placements: tuple[Any, ...]) -> list[int]:
    """The indices of a rank along a dimension, by torch's own cutting."""
    found: Tensor = torch.arange(extent)
    for place, count, placement in zip(mesh.place or (), mesh.shape, placements, strict=True):
        if getattr(placement, "dim", None) != dim:
            continue
        cut = placement.local_shard_size_and_offset
        if isinstance(placement, _StridedShard):
            _, at = cut(len(found), count, place, offset_mode=_StridedShardOffsetMode.ALL)
            found = found[torch.tensor(at, dtype=torch.int64)]
        else:
            size, start = cut(len(found), count, place)
            found = found[start : start + size]
    return found.tolist()


def test_the_box_of_a_rank_is_where_torch_cuts() -> None:
    choices = [Replicate(), Shard(0), Shard(1), *(_StridedShard(0, split_factor=n) for n in (2, 3))]
    shapes, boxes = [(8, 6), (5, 3), (0, 3), (13, 4)], 0
    for shape, extents in itertools.product(shapes, [(2,), (2, 2), (2, 3)]):
        for placements in itertools.product(choices, repeat=len(extents)):
            for place in itertools.product(*map(range, extents)):
                mesh = _Mesh(extents, place)
                wanted = [_indices(n, dim, mesh, placements) for dim, n in enumerate(shape)]
                box = _box_of.__wrapped__(torch.Size(shape), mesh, placements)
                runs = all(held == list(range(held[0], held[-1] + 1)) for held in wanted if held)
                assert (box is not None) is runs
                if box is not None and all(wanted):
                    assert (box.start, box.stop) == (
                        tuple(held[0] for held in wanted),
                        tuple(held[-1] + 1 for held in wanted),
                    )
                    boxes += 1
    assert boxes > 300
    outside = _box_of.__wrapped__(torch.Size((4, 2)), _Mesh((2,), None), (Shard(0),))
    assert outside == Box((0, 0), (0, 0))
