"""An unpickler that executes nothing: it makes inert objects, or refuses.

Nothing that a pickle names is imported. Containers, numbers and tensors become themselves. Objects
of the frameworks whose checkpoints are read become `PickledObject`s. Any other name is refused.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from holdfast.checkpoint.convert.sources.pickle_lengths import check_lengths
from holdfast.checkpoint.format import TORCH_NAMES
from holdfast.parallel.errors import CheckpointError

INERT_MODULES = ("argparse", "deepspeed", "megatron", "torch.distributed", "numpy")
"""Modules, with those below them, whose objects are read as records of their attributes."""
INERT = {
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("datetime", "timedelta"),
    ("torch", "Tensor"),
    ("torch", "device"),
    ("torch", "memory_format"),
    ("torch.serialization", "_get_layout"),
    ("torch.optim.lr_scheduler", "LambdaLR"),
    ("_codecs", "encode"),
    ("transformer_engine.common.recipe", "DelayedScaling"),
}
"""Single classes that are read as records too."""
_MOST_VALUES = 1 << 22
"""More than a checkpoint has beside its tensors."""
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}
_DTYPES = {
    **{torch_name: name for name, torch_name in TORCH_NAMES.items()},
    "half": "F16",
    "float": "F32",
    "double": "F64",
    "long": "I64",
    "int": "I32",
}


class PickledObject:
    """An object of another program: its arguments and attributes, without its code."""

    type_name: ClassVar[str] = ""
    """The name of its type in the pickle, with the module."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        self.args = args
        self.items: list[Any] = []
        self.__dict__.update(attributes)

    def __new__(cls, *args: Any, **attributes: Any) -> PickledObject:
        made = super().__new__(cls)
        made.__dict__.update(args=args, items=[])
        return made

    def __setstate__(self, state: Any) -> None:
        # The state of a class with slots is (attributes, slots).
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.__dict__.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Append an element; for pickled lists of another type."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Append elements; for pickled lists of another type."""
        self.items.extend(values)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the object, or `default`."""
        return self.__dict__.get(name, default)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a torch file: its place in one of the storages."""

    storage: str
    """The name of the storage's record in the file."""
    dtype: str
    """The element type, by safetensors' name."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    """The first element, in elements of the storage."""


@dataclass(frozen=True, slots=True)
class _Storage:
    name: str
    dtype: str


@dataclass(frozen=True, slots=True)
class _Named:
    """A dtype, or a type of storage, by its name."""

    dtype: str


def _tensor(
    storage: _Storage,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _grad: bool = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> StoredTensor:
    _refuse_lazy(metadata)
    return StoredTensor(storage.name, storage.dtype, tuple(shape), tuple(strides), start)


def _refuse_lazy(metadata: Any) -> None:
    """Refuse a tensor whose bytes are its values' conjugates or negatives, as torch keeps some."""
    if isinstance(metadata, Mapping):
        for bit in ("conj", "neg"):
            if metadata.get(bit):
                raise CheckpointError(
                    f"a tensor is stored as a view with torch's {bit} bit; save what its "
                    f"resolve_{bit}() gives"
                )


def _untyped_tensor(
    storage: _Storage,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _grad: bool,
    _hooks: Any,
    dtype: _Named,
    metadata: Any = None,
) -> StoredTensor:
    _refuse_lazy(metadata)
    return StoredTensor(storage.name, dtype.dtype, tuple(shape), tuple(strides), start)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _tensor_of_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    # The attributes of a tensor are not needed; only functions that rebuild tensors may be called.
    if function not in (_tensor, _untyped_tensor, _parameter):
        raise CheckpointError("a tensor that is rebuilt by something else than a tensor's function")
    return function(*arguments)


def _as_tuple(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "tuple"): tuple,
    ("builtins", "int"): int,
    ("torch", "Size"): _as_tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _untyped_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_type,
    ("torch.nn.parameter", "Parameter"): _parameter,
}


class _Reader(pickle.Unpickler):
    """The unpickler of this module."""

    def __init__(self, content: bytes, where: str) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._where = where
        self._types: dict[tuple[str, str], type[PickledObject]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        function = _FUNCTIONS.get((module, name))
        if function is not None:
            return function
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Named(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Named(_DTYPES[name])
        top = any(module == known or module.startswith(f"{known}.") for known in INERT_MODULES)
        if top or (module, name) in INERT:
            if (module, name) not in self._types:
                made = type(name, (PickledObject,), {"type_name": f"{module}.{name}"})
                self._types[module, name] = made
            return self._types[module, name]
        raise CheckpointError(
            f"{self._where} is refused: its pickle asks for {module}.{name}, which is not among "
            "the types that a checkpoint is made of; nothing of it was executed"
        )

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _Named(dtype=dtype), str(name), _, _):
                return _Storage(name, dtype)
        raise CheckpointError(
            f"{self._where} refers to {pid!r:.80}, which is not a tensor's storage"
        )


def read_pickle(content: bytes, where: str) -> Any:
    """The content of a pickle, read without executing it.

    Args:
        where: the file, for messages.
    Raises:
        CheckpointError: the pickle names a type that is not allowed, or is damaged.
    """
    try:
        check_lengths(content)
        return _Reader(content, where).load()
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(told if where in told else f"{where} is refused: {told}") from error
    except Exception as error:
        # A damaged pickle can raise any exception.
        raise CheckpointError(
            f"{where} is damaged: its pickle cannot be read ({type(error).__name__}: {error})"
        ) from error


def count_values() -> Callable[[], None]:
    """A call for each value that is visited, which ends a visit of too many.

    A list that is in another one many times is few bytes, and any number of values.
    """
    visited = itertools.count()

    def visit() -> None:
        if next(visited) >= _MOST_VALUES:
            raise CheckpointError(f"a pickle stands for more than {_MOST_VALUES:,} values")

    return visit


def plain(value: Any) -> Any:
    """The JSON form of a value: numbers, text, lists, dicts; records become their attributes.

    Raises:
        CheckpointError: it stands for too many values.
    """
    return _plain(value, count_values())


def _plain(value: Any, visit: Callable[[], None]) -> Any:
    visit()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {
            str(key): made
            for key, item in value.items()
            if (made := _plain(item, visit)) is not None or item is None
        }
    if isinstance(value, list | tuple):
        return [_plain(item, visit) for item in value]
    if isinstance(value, PickledObject):
        if len(value.args) == 1 and not isinstance(value.args[0], PickledObject):
            return _plain(value.args[0], visit)
        own = {key: item for key, item in value.__dict__.items() if key not in ("args", "items")}
        return _plain(own, visit) if own else None
    if isinstance(value, _Named):
        return f"torch.{TORCH_NAMES[value.dtype]}"
    return None


def unplain(value: Any, path: str) -> Iterator[str]:
    """The paths of what `plain` has no form for, tensors among it; keys are joined by /."""
    if isinstance(value, PickledObject) and plain(value) is not None:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from unplain(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from unplain(item, f"{path}/{number}")
    elif value is not None and plain(value) is None:
        yield path
