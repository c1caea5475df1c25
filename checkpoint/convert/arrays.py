"""Elements in memory as numpy has them: bits, moved and compared. torch is imported for arithmetic only.

Importing torch takes longer than converting a gibibyte, and most conversions change no number.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.checkpoint.format import ELEMENT_BYTES

if TYPE_CHECKING:
    from torch import Tensor

Bits = NDArray[Any]
"""Elements as unsigned integers of their size, so that copies keep every bit and a NaN equals itself."""
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
"""Types that numpy has too."""


def bits(memory: NDArray[np.uint8], dtype: str) -> Bits:
    """Memory uint8[n * element bytes] as elements [n]."""
    return memory.view(_BITS[ELEMENT_BYTES[dtype]])


def strided(elements: Bits, shape: Sequence[int], strides: Sequence[int]) -> Bits:
    """A view of `shape`; strides in elements."""
    step = elements.itemsize
    return np.lib.stride_tricks.as_strided(
        elements, tuple(shape), tuple(stride * step for stride in strides), writeable=False
    )


def cast(values: Bits, source: str, target: str) -> Bits:
    """The same numbers in another type, to nearest, half to even. float → float, or the same type."""
    if source == target:
        return values
    return _bits_of(_tensor(values, source).to(_torch_type(target)))


def combine(values: Sequence[Bits], source: str, target: str, *, mean: bool) -> Bits:
    """The sum of arrays of one shape, or their mean, in the source's type; then in the target's."""
    first, *others = (_tensor(value, source) for value in values)
    total = sum(others, first)
    return _bits_of((total / len(values) if mean else total).to(_torch_type(target)))


def number(content: bytes, dtype: str) -> float | int | bool:
    """The number that an element's bytes are."""
    if dtype in _NUMBERS:
        return np.frombuffer(content, _NUMBERS[dtype])[0].item()
    return _tensor(bits(np.frombuffer(content, np.uint8), dtype), dtype).item()


def load_torch() -> None:
    """Import what arithmetic needs; before processes are forked that would each do it."""
    import torch  # noqa: F401


def use_one_thread() -> None:
    """In this process, where it computes."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


def _torch_type(dtype: str) -> Any:
    from holdfast.checkpoint.dtypes import TORCH_DTYPES

    return TORCH_DTYPES[dtype]


def _tensor(values: Bits, dtype: str) -> Tensor:
    import torch

    # numpy's unsigned types of more than a byte have few operations in torch; bytes have all that is needed.
    content = np.array(values, order="C", copy=True)
    flat = torch.from_numpy(content.reshape(-1).view(np.uint8))
    return flat.view(_torch_type(dtype)).view(values.shape)


def _bits_of(tensor: Tensor) -> Bits:
    import torch

    found = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found.view(_BITS[tensor.element_size()]).reshape(tuple(tensor.shape))
