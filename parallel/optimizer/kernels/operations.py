"""The operations on gradients and their integer sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

NONFINITE = 1
OUT_OF_RANGE = 2


class SumOperations(Protocol):
    """What is done with gradients and their sums. Every tensor is contiguous. Local.

    Sums are int64 multiples of 2**-fraction_bits, fraction_bits is 0 to 62. Sums, floats and flags
    have the same bits on every device; `sum_squares` has an order of its own on each kind of
    device, which is always the same there.
    """

    def accumulate(
        self,
        sums: Tensor,
        gradient: Tensor,
        fraction_bits: int,
        flags: Tensor,
        /,
        *,
        first: bool = False,
    ) -> None:
        """Add round(gradient * 2**fraction_bits) to `sums`, half to even.

        Args:
            gradient: of any float dtype, with as many elements as `sums`. What is not finite, or
                not below 2**63 once scaled, adds nothing. An overflowing sum wraps.
            flags: int64 scalar, which gets NONFINITE and OUT_OF_RANGE.
            first: whether `sums` is to be written as if it had been zero.
        """
        ...

    def accumulate_rows(
        self, sums: Tensor, rows: Tensor, gradient: Tensor, fraction_bits: int, flags: Tensor, /
    ) -> None:
        """As `accumulate`, for row rows[k] of `sums` and row k of `gradient`.

        Args:
            rows: int64[k], distinct and within `sums`.
        """
        ...

    def add_integers(self, sums: Tensor, other: Tensor, /) -> int:
        """Add `other` to `sums`, both int64. Returns OUT_OF_RANGE if any sum wrapped."""
        ...

    def convert(self, sums: Tensor, output: Tensor, fraction_bits: int, /) -> float:
        """Write sums * 2**-fraction_bits to `output`, rounded once. Returns its `sum_squares`.

        Args:
            output: float32 or float64, with as many elements as `sums`.
        """
        ...

    def sum_squares(self, values: Tensor, /) -> float:
        """Add up the squares of float32 or float64 values, in float64."""
        ...

    def bit_sums(self, parts: Sequence[tuple[Tensor, int]], /) -> list[int]:
        """The weighted sums modulo 2**64 of the bits of values; see `bit_sum_16` in _native.pyi.

        Sums of disjoint ranges of places add up to that of all. A device is waited for once.

        Args:
            parts: values of 2, 4 or 8 bytes each, flat, and the place of the first one.
        """
        ...

    def pack(self, sums: Tensor, output: Tensor, /) -> int:
        """Write `sums` to `output` without the bytes that only repeat the sign.

        The format is in csrc/packing.h.

        Args:
            sums: int64[count].
            output: uint8[_native.packed_bound(count) or more].
        Returns:
            The bytes written.
        """
        ...

    def unpack_add(self, packed: Tensor, base: Tensor | None, output: Tensor, /) -> int:
        """Write base[i] + element i of `packed` to `output`.

        Args:
            packed: uint8; bytes behind the last run are not read.
            base: int64[count], may be `output`; None: the elements alone.
            output: int64[count].
        Returns:
            OUT_OF_RANGE if a sum wrapped.
        Raises:
            ValueError: a width is above 8, or `packed` is too short for the widths. Nothing has
                been written.
        """
        ...
