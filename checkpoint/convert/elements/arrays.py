"""Elements of tensors in memory as numpy arrays: moved, compared and rounded as bits.

torch takes longer to import than a gibibyte to convert, so it serves only types that numpy lacks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.checkpoint.format import ALIGNMENT, ELEMENT_BYTES

if TYPE_CHECKING:
    from torch import Tensor

Bits = NDArray[Any]
"""Elements as unsigned integers of their size, so that copies keep every bit and a NaN equals
itself."""
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NUMBERS: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "I64": np.int64,
    "U64": np.uint64,
    "F64": np.float64,
}
"""The types that numpy has too."""
_WIDE = ("F32", "BF16", "F16")
"""The types whose numbers are all numbers of float32."""


@dataclass(slots=True)
class GrowingMemory:
    """Host memory that grows to the size asked for and is reused."""

    buffer: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def take(self, nbytes: int, misalignment: int = 0) -> NDArray[np.uint8]:
        """Take `nbytes` that begin `misalignment` bytes after a multiple of ALIGNMENT."""
        if self.buffer.size < nbytes + 2 * ALIGNMENT:
            self.buffer = np.empty(0, np.uint8)
            self.buffer = np.empty(nbytes + 2 * ALIGNMENT, np.uint8)
        start = (misalignment - self.buffer.ctypes.data) % ALIGNMENT
        return self.buffer[start : start + nbytes]


def bits(memory: NDArray[np.uint8], dtype: str) -> Bits:
    """The memory uint8[n * element bytes] as elements [n]."""
    return memory.view(_BITS[ELEMENT_BYTES[dtype]])


def strided(elements: Bits, shape: Sequence[int], strides: Sequence[int]) -> Bits:
    """A view of `elements` with this shape and these strides, in elements."""
    step = elements.itemsize
    return np.lib.stride_tricks.as_strided(
        elements, tuple(shape), tuple(stride * step for stride in strides), writeable=False
    )


def cast(values: Bits, source: str, target: str) -> Bits:
    """Cast floats to another float type, to nearest, half to even; no change for one type."""
    if source == target:
        return values
    if source in _WIDE and target in _WIDE:
        return _narrow(_widen(values, source), target)
    return _bits_of(_tensor(values, source).to(_torch_type(target)))


def combine(values: Sequence[Bits], source: str, target: str, *, mean: bool) -> Bits:
    """The sum of arrays of one shape, or their mean, in the source's type, cast to the target's."""
    if source == "F32" and target in _WIDE:
        first, *others = (value.view(np.float32) for value in values)
        total = sum(others, first)
        return _narrow(total / np.float32(len(values)) if mean else total, target)
    first, *others = (_tensor(value, source) for value in values)
    total = sum(others, first)
    return _bits_of((total / len(values) if mean else total).to(_torch_type(target)))


def number(content: bytes, dtype: str) -> float | int | bool:
    """The number that an element's bytes encode."""
    if dtype in _NUMBERS:
        return np.frombuffer(content, _NUMBERS[dtype])[0].item()
    return _tensor(bits(np.frombuffer(content, np.uint8), dtype), dtype).item()


def needs_torch(source: str, target: str, *, combines: bool) -> bool:
    """Whether `cast`, or `combine`, needs torch for these types."""
    if combines:
        return source != "F32" or target not in _WIDE
    return source != target and not (source in _WIDE and target in _WIDE)


def load_torch() -> None:
    """Import torch before forking processes that would each import it."""
    import torch  # noqa: F401


def use_one_thread() -> None:
    """Use one thread of torch in this process, if torch is loaded."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _widen(values: Bits, dtype: str) -> NDArray[np.float32]:
    """float32 values of the same numbers."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.view(_NUMBERS[dtype]).astype(np.float32)


def _narrow(values: NDArray[np.float32], dtype: str) -> Bits:
    """float32 numbers as bits of another type, to nearest, half to even."""
    if dtype == "BF16":
        found = np.ascontiguousarray(values).view(np.uint32)
        rounded = found >> 16
        rounded &= 1
        rounded += found
        rounded += 0x7FFF
        rounded >>= 16
        half = rounded.astype(np.uint16)
        half[np.isnan(values)] = 0x7FC0
        return half
    with np.errstate(over="ignore"):
        return values.astype(_NUMBERS[dtype]).view(_BITS[ELEMENT_BYTES[dtype]])


def _torch_type(dtype: str) -> Any:
    from holdfast.checkpoint.format import TORCH_DTYPES

    return TORCH_DTYPES[dtype]


def _tensor(values: Bits, dtype: str) -> Tensor:
    import torch

    # torch has few operations for numpy's unsigned types of more than a byte; bytes have all that
    # is needed.
    content = np.array(values, order="C", copy=True)
    flat = torch.from_numpy(content.reshape(-1).view(np.uint8))
    return flat.view(_torch_type(dtype)).view(values.shape)


def _bits_of(tensor: Tensor) -> Bits:
    import torch

    found = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found.view(_BITS[tensor.element_size()]).reshape(tuple(tensor.shape))
