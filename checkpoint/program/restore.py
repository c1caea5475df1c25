"""What is loaded into a program on one rank: where each tensor goes, and what is done afterwards.

Whatever the state asks for must have a source in the checkpoint, in the same form, and whatever the
checkpoint has under a key that is asked for must have a place. Anything else is refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.checkpoint.format import (
    BUFFER,
    TORCH_DTYPES,
    WEIGHT,
    Manifest,
    same_tensor,
)
from holdfast.checkpoint.loading import LoadTarget
from holdfast.checkpoint.program.described import (
    ProgramState,
    check_state,
    is_object,
    is_plain_optimizer,
    is_torch_optimizer,
)
from holdfast.checkpoint.program.documents import checked, documents_of
from holdfast.checkpoint.program.modules import (
    bare,
    canonical,
    extra_states,
    has_own_loading,
    load_again,
    module_tensors,
    prefix_of,
)
from holdfast.checkpoint.program.optimizers import OptimizerRestore, entry_of
from holdfast.checkpoint.program.tensors import (
    check_tensor,
    completed,
    device_of,
    is_dtensor,
    local_part,
)
from holdfast.checkpoint.program.values import TAG, decode, references
from holdfast.parallel.errors import CheckpointError


class Restore:
    """The restoration of one checkpoint into a program's state, on one rank. Local.

    It is made before any tensor is read, and `finish` is called when all are.
    """

    def __init__(
        self,
        state: ProgramState,
        manifest: Manifest,
        rank: int,
        size: int,
        allow: Sequence[str] = (),
    ) -> None:
        """Find the source of everything that the state asks for. Nothing is changed yet.

        Args:
            allow: the names, or patterns of names, that the checkpoint or a module may lack.
        Raises:
            CheckpointError: something has no source, or another form; it is named.
        """
        check_state(state)
        self.targets: defaultdict[str, list[LoadTarget]] = defaultdict(list)
        self.claimed: dict[str, list[str]] = {}
        """By key: what this rank has a place for of the things that other ranks may have."""
        self.loaded: dict[str, Any] = {}
        """The plain values, complete once `finish` has run."""
        self._state, self._manifest = state, manifest
        self._docs, self._is_exact = documents_of(manifest)
        self._rank, self._size, self._allow = rank, size, allow
        self._places: dict[Any, tuple[str, str]] = {}
        """By place in memory: the tensor that is loaded there, and the path of its value."""
        self._later: list[Callable[[], object]] = []
        names: dict[Tensor, str] = {}
        modules = {k: v for k, v in state.items() if isinstance(v, nn.Module)}
        for key, module in modules.items():
            self._prepare_module(key, bare(module), names)
        for key, value in state.items():
            if key not in modules:
                self._prepare_value(key, value, names)
        for key in self._docs:
            if key not in state and (plain := self._plain_of(key)) is not None:
                self.loaded[key] = plain[0]

    def finish(self) -> None:
        """Restore what is no tensor, and hand over what was read."""
        for act in self._later:
            act()

    def check_claims(self, claims: Sequence[Mapping[str, Collection[str]]]) -> None:
        """Refuse a checkpoint of which no rank has a place for something.

        Args:
            claims: `claimed` of all ranks.
        Raises:
            CheckpointError: a key's tensors, extra states or parameters go unused; they are named.
        """
        for key in self.claimed:
            taken = {name for claim in claims for name in claim.get(key, ())}
            left = [n for n in self._offered(key) if n not in taken and not self._may_lack(n)]
            if left:
                raise CheckpointError(
                    f"the checkpoint has {_some(left)} for {key}, which {key} has no place for; "
                    "it is of another program, or name them in `allow` to leave them out"
                )

    def _may_lack(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._allow)

    def _offered(self, key: str) -> list[str]:
        """What the checkpoint has for a module or an optimizer."""
        doc = self._doc_of(key)
        if isinstance(self._state[key], nn.Module):
            if doc is not None:
                return [*doc["tensors"].values(), *map(canonical, doc["extra"])]
            return self._unnamed_weights(key)
        return [name for group in doc["groups"] for name in group["params"]] if doc else []

    def _unnamed_weights(self, key: str) -> list[str]:
        """The weights for a module, in a checkpoint that does not list them by key."""
        prefix = prefix_of(key)
        others = [prefix_of(k) for k, v in self._state.items() if isinstance(v, nn.Module)]
        return [
            name
            for name, entry in self._manifest.tensors.items()
            if entry.kind in (WEIGHT, BUFFER)
            and name.startswith(prefix)
            and not any(len(o) > len(prefix) and name.startswith(o) for o in others)
            and name not in self._state
        ]

    def _doc_of(self, key: str) -> Any:
        """This rank's document of a key; None if the checkpoint has none.

        Raises:
            CheckpointError: each rank has its own, and this program has another number of ranks.
        """
        doc = self._docs.get(key)
        if not self._is_exact or not isinstance(doc, dict) or doc.get(TAG) != "ranks":
            return checked(doc, key)
        if len(checked(doc, key)["value"]) != self._size:
            raise CheckpointError(
                f"{key} was saved by {len(doc['value'])} ranks, each with its own values, and this "
                f"program has {self._size}; leave {key} out of the state to go on without them"
            )
        return checked(doc["value"][self._rank], key)

    def _prepare_module(self, key: str, module: nn.Module, names: dict[Tensor, str]) -> None:
        doc = self._doc_of(key)
        if doc is not None and (not isinstance(doc, dict) or doc.get(TAG) != "module"):
            raise CheckpointError(
                f"{key} is a module, and the checkpoint's {key} is none; what was saved as a "
                "state_dict is loaded as one"
            )
        if doc is None and self._is_exact:
            raise CheckpointError(f"the checkpoint has no module {key}; it has {_some(self._docs)}")
        known = doc["tensors"] if doc else {n: n for n in self._manifest.tensors}
        listed = {canonical(name): full for name, full in known.items()}
        extra = {canonical(name): value for name, value in doc["extra"].items()} if doc else {}
        parameters, buffers = module_tensors(module, key)
        claimed: list[str] = []
        missing: list[str] = []
        for name, tensor in {**parameters, **buffers}.items():
            full = listed.get(name if doc else prefix_of(key) + name)
            path = prefix_of(key) + name
            if full not in self._manifest.tensors:
                missing.append(path)
                names.setdefault(tensor, path)
                continue
            claimed.append(full)
            names.setdefault(tensor, full)
            self._add_target(full, tensor, path)
        for name, inner in extra_states(module).items():
            if name not in extra:
                missing.append(prefix_of(key) + name)
                continue
            claimed.append(name)
            path = f"{prefix_of(key)}{name}"
            value = decode(extra[name], None, path, self._make_new, self._later.append)
            self._later.append(lambda inner=inner, value=value: inner.set_extra_state(value))
        missing = [path for path in missing if not self._may_lack(path)]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {_some(missing)}, which {key} needs; name them in `allow` "
                "to leave them as they are"
            )
        self.claimed[key] = claimed
        if has_own_loading(module):
            self._later.append(lambda: load_again(module))

    def _prepare_value(self, key: str, value: Any, names: Mapping[Tensor, str]) -> None:
        doc = self._doc_of(key)
        if isinstance(value, Tensor) and doc is None and key in self._manifest.tensors:
            self._add_target(key, value, key)
            self.loaded[key] = value
            return
        if key not in self._docs:
            raise CheckpointError(
                f"the checkpoint has nothing for {key}; it has {_some(self._docs) or 'no state'}"
            )
        kind = doc.get(TAG) if isinstance(doc, dict) else None
        if is_plain_optimizer(value) or (kind == "optimizer" and is_torch_optimizer(value)):
            self._prepare_optimizer(key, value, doc, names)
        elif kind in ("module", "optimizer"):
            raise CheckpointError(
                f"{key} is a {type(value).__name__}, and the checkpoint's {key} is the state of "
                f"{'a module' if kind == 'module' else 'an optimizer'}; give that in its place"
            )
        elif self._is_exact and (kind == "object") != is_object(value) and value is not None:
            raise CheckpointError(
                f"{key} is a {type(value).__name__}, and the checkpoint's {key} is "
                f"{'the state of an object' if kind == 'object' else 'a plain value'}"
            )
        elif is_object(value) or kind == "object":
            found = doc
            if self._is_exact:
                old = value.state_dict() if references(doc) and value is not None else None
                found = decode(doc["value"], old, key, self._make_new, self._later.append)
            if hasattr(value, "load_state_dict"):
                self._later.append(lambda: value.load_state_dict(found))
            else:
                self.loaded[key] = found
        elif isinstance(value, Tensor):
            if kind != "tensor":
                raise CheckpointError(f"{key} is a tensor, and the checkpoint's {key} is none")
            self._add_target(doc["name"], value, key)
            self.loaded[key] = value
        else:
            self.loaded[key] = self._decoded(doc, value, key)

    def _decoded(self, doc: Any, old: Any, key: str) -> Any:
        if not self._is_exact:
            return doc
        return decode(doc, old, key, self._make_in_place, self._later.append)

    def _plain_of(self, key: str) -> tuple[Any] | None:
        """The plain value of a key that the state does not name; None if it is more than that."""
        doc = self._docs[key]
        if not self._is_exact:
            return (doc,)
        if isinstance(doc, dict) and doc.get(TAG) in ("module", "optimizer", "object", "ranks"):
            return None
        return None if references(doc) else (self._decoded(doc, None, key),)

    def _prepare_optimizer(
        self, key: str, optimizer: Optimizer, doc: Any, names: Mapping[Tensor, str]
    ) -> None:
        restore = OptimizerRestore(key, optimizer, names, self._manifest, self._add_target)
        if self._is_exact:
            self.claimed[key] = restore.prepare(doc, self._later.append)
        else:
            restore.prepare_first_version(doc)
        self._later.append(restore.finish)

    def _add_target(self, name: str, value: Tensor, path: str) -> None:
        """Note that a tensor of the checkpoint is read into a tensor of this program."""
        entry = entry_of(self._manifest, name, path)
        check_tensor(value, path)
        if tuple(value.shape) != entry.shape:
            raise CheckpointError(
                f"{path} has shape {list(value.shape)}, and the checkpoint's {name} has "
                f"{list(entry.shape)}; a tensor is loaded whole"
            )
        local, box = local_part(value, path)
        if any(not step and n > 1 for step, n in zip(local.stride(), local.shape, strict=True)):
            raise CheckpointError(
                f"{path} has several elements at one place in memory; give it memory of its own "
                "(contiguous()) before it is loaded"
            )
        self._check_alone(name, local, path)
        self.targets[name].append(LoadTarget(box, local))

    def _check_alone(self, name: str, local: Tensor, path: str) -> None:
        """Refuse a place in memory that two tensors share which the checkpoint has different."""
        place = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride())
        other, before = self._places.setdefault(place, (name, path)) if local.numel() else ("", "")
        if other in ("", name):
            return
        if not same_tensor(self._manifest, other, name):
            raise CheckpointError(
                f"{before} and {path} are one tensor here, and two that differ in the checkpoint"
            )

    def _make_in_place(self, doc: Mapping[str, Any], old: Any, path: str) -> Tensor:
        """The tensor inside a plain value: the present one, or a new one where there is none."""
        if not isinstance(old, Tensor):
            return self._make_new(doc, old, path)
        self._add_target(doc["name"], old, path)
        return old

    def _make_new(self, doc: Mapping[str, Any], old: Any, path: str) -> Tensor:
        """A new tensor for one inside a value that is handed over whole."""
        entry = entry_of(self._manifest, doc["name"], path)
        if doc.get("dtensor") and not is_dtensor(old):
            raise CheckpointError(
                f"{path} was saved as a DTensor; give one of its shape and placements to load into"
            )
        dtype = TORCH_DTYPES[entry.dtype]
        if doc.get("dtensor"):
            made = torch.zeros_like(old.detach(), dtype=dtype)
        else:
            made = torch.zeros(entry.shape, dtype=dtype, device=device_of(doc))
        self._add_target(doc["name"], made, path)
        return completed(made, doc)


def _some(names: Collection[str]) -> str:
    """The first names of several, and how many more there are."""
    first = list(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(first) + more
