"""What is loaded into one optimizer: the state and the groups that the checkpoint has, exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from holdfast.checkpoint.format import (
    STEP,
    TORCH_DTYPES,
    UNPREFIXED_KINDS,
    Manifest,
    TensorEntry,
    base_name,
)
from holdfast.checkpoint.program.described import name_of_parameter
from holdfast.checkpoint.program.tensors import completed, device_of, is_dtensor, replicated
from holdfast.checkpoint.program.values import TAG, Later, MakeTensor, decode
from holdfast.parallel.errors import CheckpointError

AddTarget = Callable[[str, Tensor, str], None]
"""(tensor of the checkpoint, tensor to read it into, path)"""


def entry_of(manifest: Manifest, name: str, path: str) -> TensorEntry:
    """What a manifest says of a tensor that the value at `path` needs.

    Raises:
        CheckpointError: the checkpoint lacks it.
    """
    entry = manifest.tensors.get(name)
    if entry is None:
        raise CheckpointError(f"the checkpoint lacks {name}, which {path} needs")
    return entry


class OptimizerRestore:
    """The restoration of one optimizer. `prepare` makes its new state, `finish` puts it there."""

    def __init__(
        self,
        key: str,
        optimizer: Optimizer,
        names: Mapping[Tensor, str],
        manifest: Manifest,
        add_target: AddTarget,
    ) -> None:
        """Note what is restored.

        Args:
            names: the checkpoint's name of each parameter.
        """
        self._key, self._optimizer = key, optimizer
        self._manifest, self._add_target = manifest, add_target
        self._listed = [
            [name_of_parameter(p, names, key) for p in group["params"]]
            for group in optimizer.param_groups
        ]
        self._groups: list[dict[str, Any]] = []
        self._states: dict[Any, Any] = {}

    def prepare(self, doc: Any, later: Later) -> list[str]:
        """Make the new state by the checkpoint's document. Returns the names of the parameters.

        Raises:
            CheckpointError: the checkpoint has no such optimizer, or one with other groups.
        """
        key = self._key
        if not isinstance(doc, dict) or doc.get(TAG) != "optimizer":
            raise CheckpointError(f"{key} is an optimizer, and the checkpoint's {key} is none")
        saved, live = doc["groups"], self._optimizer.param_groups
        if len(saved) != len(live) and not doc.get("merged"):
            raise CheckpointError(
                f"{key} has {len(live)} param_groups, and the checkpoint's {key} has {len(saved)}"
            )
        place = {name: n for n, group in enumerate(saved) for name in group["params"]}
        if not doc.get("merged"):
            self._check_order(saved, place)
        for number, group in enumerate(live):
            path = f"{key}.param_groups[{number}]"
            values = saved[self._place_of(number, saved, place)]
            self._groups.append(
                {
                    name: decode(value, group.get(name), f"{path}[{name!r}]", self._make, later)
                    for name, value in values.items()
                    if name != "params"
                }
            )
            self._check_group(number)
            for name, parameter in zip(self._listed[number], group["params"], strict=True):
                if name in doc["state"]:
                    make = self._maker(parameter, group)
                    place_name = f"{key}.state[{name}]"
                    self._states[parameter] = decode(
                        doc["state"][name], None, place_name, make, later
                    )
        for owner, value in doc["other"]:
            found = decode(owner, None, key, self._make, later)
            self._states[found] = decode(value, None, f"{key}.state", self._make, later)
        return [name for listed in self._listed for name in listed]

    def prepare_first_version(self, doc: Any) -> None:
        """Make the new state of a checkpoint whose tensors alone say what state there is.

        Raises:
            CheckpointError: the checkpoint has no such optimizer, or lacks state that is there.
        """
        if not isinstance(doc, dict) or "groups" not in doc:
            raise CheckpointError(f"the checkpoint has no optimizer {self._key}")
        of_group = {name: group for group in doc["groups"] for name in group["params"]}
        kinds: defaultdict[str, list[str]] = defaultdict(list)
        for full, entry in self._manifest.tensors.items():
            if entry.kind not in UNPREFIXED_KINDS:
                kinds[base_name(entry.kind, full)].append(entry.kind)
        for number, group in enumerate(self._optimizer.param_groups):
            listed = self._listed[number]
            missing = [name for name in listed if name not in of_group]
            if missing:
                raise CheckpointError(f"the checkpoint's {self._key} lacks {missing[0]}")
            values = of_group[listed[0]] if listed else {}
            self._groups.append(
                {
                    name: tuple(value) if isinstance(group.get(name), tuple) else value
                    for name, value in values.items()
                    if name != "params"
                }
            )
            if listed:
                self._check_group(number)
            for name, parameter in zip(listed, group["params"], strict=True):
                self._first_version_state(name, parameter, group, kinds[name])

    def _first_version_state(
        self, name: str, parameter: Tensor, group: Mapping[str, Any], kinds: list[str]
    ) -> None:
        present = self._optimizer.state.get(parameter, {})
        lost = [kind for kind in present if kind not in kinds]
        if lost:
            raise CheckpointError(f"the checkpoint lacks {lost[0]}.{name}, which {self._key} has")
        make = self._maker(parameter, group)
        if kinds:
            self._states[parameter] = {
                kind: make({"name": f"{kind}.{name}"}, None, f"{self._key}.state[{name}][{kind!r}]")
                for kind in kinds
            }

    def finish(self) -> None:
        """Put the groups and the state in the place of the present ones."""
        for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
            kept = {
                name: value
                for name, value in group.items()
                if name == "params" or (name not in values and self._is_newer(name, value))
            }
            if values:
                group.clear()
                group.update({**kept, **values})
        self._optimizer.state.clear()
        self._optimizer.state.update(self._states)

    def _place_of(self, number: int, saved: list[dict[str, Any]], place: Mapping[str, int]) -> int:
        """The number of the checkpoint's group for one of this optimizer."""
        listed = self._listed[number]
        missing = [name for name in listed if name not in place]
        if missing:
            raise CheckpointError(f"the checkpoint's {self._key} lacks {missing[0]}")
        found = {place[name] for name in listed}
        if len(found) > 1:
            raise CheckpointError(
                f"{self._key}.param_groups[{number}] has parameters that are in different groups "
                "in the checkpoint"
            )
        if found:
            return found.pop()
        if number >= len(saved) or saved[number]["params"]:
            raise CheckpointError(
                f"{self._key}.param_groups[{number}] has no parameters, and the checkpoint has no "
                "such group"
            )
        return number

    def _check_order(self, saved: list[dict[str, Any]], place: Mapping[str, int]) -> None:
        """Refuse groups in another order: schedules have their values by the groups' numbers."""
        for number in range(len(saved)):
            found = self._place_of(number, saved, place)
            if found != number:
                raise CheckpointError(
                    f"{self._key}.param_groups[{number}] is param_groups[{found}] in the "
                    "checkpoint, and schedules go by number; make the groups in the same order"
                )

    def _check_group(self, number: int) -> None:
        """Refuse a group with a value that the checkpoint does not have."""
        for name, value in self._optimizer.param_groups[number].items():
            known = name == "params" or name in self._groups[number]
            if not known and not self._is_newer(name, value):
                raise CheckpointError(
                    f"the checkpoint lacks {self._key}.param_groups[{number}][{name!r}]"
                )

    def _is_newer(self, name: str, value: Any) -> bool:
        """Whether a group's value is an option that the torch of the checkpoint may have lacked."""
        another = self._manifest.versions.get("torch") != str(torch.__version__)
        return another and name in self._optimizer.defaults and not isinstance(value, Tensor)

    def _make(self, doc: Mapping[str, Any], old: Any, path: str) -> Tensor:
        """A new tensor for one of a group, where the present one is."""
        home = old.device if isinstance(old, Tensor) else device_of(doc)
        shape, dtype = self._form_of(doc, path)
        made = torch.zeros(shape, dtype=dtype, device=home)
        self._add_target(doc["name"], made, path)
        return completed(made, doc)

    def _maker(self, parameter: Tensor, group: Mapping[str, Any]) -> MakeTensor:
        """The function that makes the tensors of a parameter's state."""
        on_device = bool(group.get("fused") or group.get("capturable"))

        def make(doc: Mapping[str, Any], old: Any, path: str) -> Tensor:
            shape, dtype = self._form_of(doc, path)
            sharded = is_dtensor(parameter) and bool(doc.get("dtensor", shape))
            if path.endswith(f"[{STEP!r}]") and not shape:
                # torch counts updates on the host, unless a kernel counts them.
                made = torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
            elif shape == tuple(parameter.shape) and sharded == is_dtensor(parameter):
                made = torch.zeros_like(parameter.detach(), dtype=dtype)
                made = made if sharded else made.to(device_of(doc, parameter.device))
            else:
                made = torch.zeros(shape, dtype=dtype, device=device_of(doc, parameter.device))
                made = replicated(made, parameter) if sharded else made
            self._add_target(doc["name"], made, path)
            return completed(made, doc)

        return make

    def _form_of(self, doc: Mapping[str, Any], path: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry = entry_of(self._manifest, doc["name"], path)
        return entry.shape, TORCH_DTYPES[entry.dtype]
