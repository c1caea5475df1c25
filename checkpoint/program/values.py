"""Values as JSON, exactly: each type that JSON lacks is an object that names it.

What JSON has (None, bool, 64-bit int, finite float, text, list, dict with text keys) stands as it
is. Everything else is `{"__holdfast__": TYPE, ...}`. Tensors are left to a tensor file, under a
name that the caller gives. A value of any other type is refused by its path.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from holdfast.checkpoint.format import DTYPE_NAMES
from holdfast.parallel.errors import CheckpointError, shown

TAG = "__holdfast__"
"""The key that marks an object as a value of a type that JSON lacks."""
_FACTORIES = {f.__name__: f for f in (bool, dict, float, int, list, set, str, tuple)}
"""The default factories of a defaultdict that can be saved."""

KeepTensor = Callable[[Tensor, str], dict[str, Any]]
"""(tensor, path) -> its object in JSON; keeps the tensor for the tensor files."""
MakeTensor = Callable[[Mapping[str, Any], Any, str], Tensor]
"""(object in JSON, the present value at that place, path) -> the tensor that will be filled."""
Later = Callable[[Callable[[], object]], None]
"""Takes a function that is called once all tensors are filled."""


def encode(value: Any, path: str, keep: KeepTensor) -> Any:
    """The JSON form of a value.

    Args:
        path: the place of the value in the program's state, for messages: `schedule['best']`.
    Raises:
        CheckpointError: a leaf cannot be saved exactly; it is named by its path.
    """
    try:
        return _encode(value, path, keep)
    except RecursionError:
        raise CheckpointError(f"{path} cannot be saved: {_depth_fault(value)}") from None


def _depth_fault(value: Any) -> str:
    """The reason why a value has no end: it contains itself, or has too many levels."""
    open_ids, done = {id(value)}, set[int]()
    levels = [(id(value), iter(_items_of(value)))]
    while levels:
        own, items = levels[-1]
        for item in items:
            if id(item) in open_ids:
                return "it contains itself"
            if id(item) not in done and _items_of(item):
                open_ids.add(id(item))
                levels.append((id(item), iter(_items_of(item))))
                break
        else:
            levels.pop()
            open_ids.discard(own)
            done.add(own)
    return "it is nested too deeply, in 300 levels or more; save its parts by keys of their own"


def _items_of(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set | frozenset | deque) else []


def _encode(value: Any, path: str, keep: KeepTensor) -> Any:
    kind = type(value)
    if value is None or kind is bool:
        return value
    if isinstance(value, Tensor):
        return keep(value, path)
    simple = _SIMPLE.get(kind)
    if simple is not None:
        return simple(value)
    if kind in (list, tuple, torch.Size, set, frozenset, deque):
        return _encode_items(value, path, keep)
    if kind in (dict, OrderedDict, Counter, defaultdict):
        return _encode_mapping(value, path, keep)
    if isinstance(value, torch.Generator):
        state = keep(value.get_state(), path)
        return {TAG: "generator", "device": str(value.device), "value": state}
    if isinstance(value, np.generic) or kind is np.ndarray:
        return _encode_numpy(value, path, keep)
    raise CheckpointError(f"{path} cannot be saved: {_reason(value)}")


def _reason(value: Any) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, nn.Module | torch.optim.Optimizer) or hasattr(value, "state_dict"):
        return f"{name} has a state of its own; give it a key of its own in the state"
    return (
        f"a value of type {name} is none of numbers, text, bytes, lists, tuples, sets, dicts, "
        "tensors and numpy arrays; save what it is made of"
    )


def _encode_int(value: int) -> Any:
    return value if -(1 << 63) <= value < 1 << 63 else {TAG: "int", "value": hex(value)}


def _encode_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    return {TAG: "float", "value": struct.pack(">d", value).hex()}


def _encode_text(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:
        return {TAG: "text", "value": _text_of(value.encode(errors="surrogatepass"))}
    return value


def _text_of(content: bytes | bytearray) -> str:
    return base64.b64encode(content).decode()


_SIMPLE: Mapping[type, Callable[[Any], Any]] = {
    int: _encode_int,
    float: _encode_float,
    str: _encode_text,
    complex: lambda v: {TAG: "complex", "value": struct.pack(">dd", v.real, v.imag).hex()},
    bytes: lambda v: {TAG: "bytes", "value": _text_of(v)},
    bytearray: lambda v: {TAG: "bytearray", "value": _text_of(v)},
    torch.dtype: lambda v: {TAG: "dtype", "value": str(v).removeprefix("torch.")},
    torch.device: lambda v: {TAG: "device", "value": str(v)},
}


def _encode_items(value: Any, path: str, keep: KeepTensor) -> Any:
    unordered = isinstance(value, set | frozenset)
    items = [_encode(item, f"{path}[{n}]", keep) for n, item in enumerate(value)]
    if type(value) is list:
        return items
    if unordered:
        # The order of a set differs from process to process.
        items.sort(key=msgspec.json.encode)
    found: dict[str, Any] = {TAG: type(value).__name__, "value": items}
    if isinstance(value, deque):
        found["maxlen"] = value.maxlen
    return found


def _encode_mapping(value: Mapping[Any, Any], path: str, keep: KeepTensor) -> Any:
    pairs = [
        (_encode_key(key, path, keep), _encode(item, f"{path}[{key!r}]", keep))
        for key, item in value.items()
    ]
    if type(value) is dict and TAG not in value and all(type(key) is str for key, _ in pairs):
        return dict(pairs)
    found: dict[str, Any] = {TAG: type(value).__name__, "value": [list(pair) for pair in pairs]}
    if isinstance(value, defaultdict):
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and _FACTORIES.get(name) is not factory:
            raise CheckpointError(f"{path} cannot be saved: its default factory is {factory}")
        found["factory"] = name
    return found


def _encode_key(key: Any, path: str, keep: KeepTensor) -> Any:
    if isinstance(key, Tensor):
        raise CheckpointError(f"{path} cannot be saved: a tensor is a key of it")
    return _encode(key, f"{path}, its key {key!r}", keep)


def _encode_numpy(value: Any, path: str, keep: KeepTensor) -> Any:
    dtype = value.dtype
    if dtype.hasobject or dtype.fields or dtype.subdtype or not dtype.itemsize:
        raise CheckpointError(f"{path} cannot be saved: it is a numpy value of type {dtype}")
    if isinstance(value, np.generic):
        return {TAG: "numpy", "dtype": dtype.str, "value": _text_of(value.tobytes())}
    if dtype.isnative and (named := _torch_dtype_of(dtype)) is not None:
        copy = torch.from_numpy(np.array(value, order="C", copy=True))
        return {TAG: "array", "dtype": named, "value": keep(copy, path)}
    text = _text_of(np.ascontiguousarray(value).tobytes())
    return {TAG: "array", "dtype": dtype.str, "shape": list(value.shape), "bytes": text}


def _torch_dtype_of(dtype: np.dtype[Any]) -> str | None:
    """numpy's notation of a type whose tensors the tensor files can hold; None for any other."""
    try:
        known = torch.from_numpy(np.empty(0, dtype)).dtype in DTYPE_NAMES
    except TypeError:
        return None
    return dtype.str if known else None


def decode(doc: Any, old: Any, path: str, make: MakeTensor, later: Later) -> Any:
    """The value of a JSON form. Its tensors and arrays are filled afterwards, in place.

    Args:
        old: the present value at that place: tensors may be taken from it; None without one.
        later: takes what has to be done once all tensors are filled.
    """
    if isinstance(doc, list):
        return [
            decode(item, _at(old, n), f"{path}[{n}]", make, later) for n, item in enumerate(doc)
        ]
    if not isinstance(doc, dict):
        return doc
    if TAG not in doc:
        return {
            key: decode(item, _at(old, key), f"{path}[{key!r}]", make, later)
            for key, item in doc.items()
        }
    kind: str = doc[TAG]
    value: Any = doc.get("value")
    if kind == "tensor":
        return make(doc, old, path)
    if kind in _FROM_TEXT:
        return _FROM_TEXT[kind](doc)
    if kind in _FROM_ITEMS:
        items = [decode(v, _at(old, n), f"{path}[{n}]", make, later) for n, v in enumerate(value)]
        return _FROM_ITEMS[kind](items, doc)
    if kind in _FROM_PAIRS:
        keys = [decode(key, None, path, make, later) for key, _ in value]
        items = [
            decode(v, _at(old, key), f"{path}[{key!r}]", make, later)
            for key, (_, v) in zip(keys, value, strict=True)
        ]
        return _FROM_PAIRS[kind](list(zip(keys, items, strict=True)), doc)
    if kind == "array":
        return _decode_array(doc, old, path, make)
    if kind == "generator":
        same = isinstance(old, torch.Generator) and str(old.device) == doc["device"]
        generator = old if same else torch.Generator(doc["device"])
        state = make(value, None, path)
        later(lambda: generator.set_state(state))
        return generator
    raise CheckpointError(f"{path} is a value of type {kind!r}, which this version does not read")


def _at(old: Any, key: Any) -> Any:
    """The item of a container; None if it has none."""
    if isinstance(old, list | tuple | deque) and isinstance(key, int):
        return old[key] if key < len(old) else None
    return old.get(key) if isinstance(old, Mapping) else None


def _decode_array(doc: Mapping[str, Any], old: Any, path: str, make: MakeTensor) -> Any:
    if "bytes" in doc:
        raw = np.frombuffer(base64.b64decode(doc["bytes"]), np.dtype(doc["dtype"]))
        return raw.reshape(doc["shape"]).copy()
    fits = (
        type(old) is np.ndarray
        and old.dtype.str == doc["dtype"]
        and old.flags.writeable
        and all(stride >= 0 for stride in old.strides)
    )
    memory = make(doc["value"], torch.from_numpy(old) if fits else None, path)
    return old if fits else memory.numpy()


def _numpy_of(doc: Mapping[str, Any]) -> Any:
    return np.frombuffer(base64.b64decode(doc["value"]), np.dtype(doc["dtype"]))[0]


def _dtype_of(doc: Mapping[str, Any]) -> torch.dtype:
    found = getattr(torch, doc["value"], None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{shown(doc['value'])} is no dtype of this version of torch")
    return found


_FROM_TEXT: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "int": lambda doc: int(doc["value"], 16),
    "float": lambda doc: struct.unpack(">d", bytes.fromhex(doc["value"]))[0],
    "complex": lambda doc: complex(*struct.unpack(">dd", bytes.fromhex(doc["value"]))),
    "text": lambda doc: base64.b64decode(doc["value"]).decode(errors="surrogatepass"),
    "bytes": lambda doc: base64.b64decode(doc["value"]),
    "bytearray": lambda doc: bytearray(base64.b64decode(doc["value"])),
    "dtype": _dtype_of,
    "device": lambda doc: torch.device(doc["value"]),
    "numpy": _numpy_of,
}
_FROM_ITEMS: Mapping[str, Callable[[list[Any], Mapping[str, Any]], Any]] = {
    "tuple": lambda items, doc: tuple(items),
    "Size": lambda items, doc: torch.Size(items),
    "set": lambda items, doc: set(items),
    "frozenset": lambda items, doc: frozenset(items),
    "deque": lambda items, doc: deque(items, doc["maxlen"]),
}
_FROM_PAIRS: Mapping[str, Callable[[list[Any], Mapping[str, Any]], Any]] = {
    "dict": lambda pairs, doc: dict(pairs),
    "OrderedDict": lambda pairs, doc: OrderedDict(pairs),
    "Counter": lambda pairs, doc: Counter(dict(pairs)),
    "defaultdict": lambda pairs, doc: defaultdict(
        _FACTORIES[doc["factory"]] if doc["factory"] else None, pairs
    ),
}


def references(doc: Any) -> list[str]:
    """The names of the tensors that a JSON form refers to."""
    if isinstance(doc, list):
        return [name for item in doc for name in references(item)]
    if not isinstance(doc, dict):
        return []
    if doc.get(TAG) == "tensor":
        return [doc["name"]]
    return [name for item in doc.values() for name in references(item)]


def with_names(doc: Any, names: Mapping[str, str]) -> Any:
    """The JSON form with the tensors that it refers to renamed."""
    if isinstance(doc, list):
        return [with_names(item, names) for item in doc]
    if not isinstance(doc, dict):
        return doc
    if doc.get(TAG) == "tensor":
        return {**doc, "name": names.get(doc["name"], doc["name"])}
    return {key: with_names(item, names) for key, item in doc.items()}
