"""Precisions of training: what parameters are kept in, and what the optimizer keeps its state in.

The one table of them: element sizes, names in files and torch's dtypes are read from it, and the
values that `train.precision` allows are its keys. Importing it needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """One element type that a model is trained in."""

    name: str
    """In configurations: "bf16"."""
    torch_name: str
    """Of torch's dtype, which is also what a Hugging Face config.json says: "bfloat16"."""
    stored: str
    """safetensors' name of the element type: "BF16"."""
    bytes: int
    """Of one element."""
    state_name: str
    """The precision of the optimizer's state and of gradients in fast mode."""

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype of the parameters."""
        import torch

        return getattr(torch, self.torch_name)

    @property
    def state(self) -> Precision:
        """The precision of the optimizer's state."""
        return PRECISIONS[self.state_name]

    @property
    def has_master(self) -> bool:
        """Whether the optimizer keeps a copy of the parameters with more bits, and updates that."""
        return self.state_name != self.name


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", "F32", 4, state_name="fp32"),
        Precision("bf16", "bfloat16", "BF16", 2, state_name="fp32"),
        Precision("fp64", "float64", "F64", 8, state_name="fp64"),
    )
}
"""By the name that `train.precision` gives."""


def precision_of(dtype: torch.dtype) -> Precision:
    """The precision whose parameters have a dtype.

    Raises:
        ValueError: none has; the message names those there are.
    """
    for precision in PRECISIONS.values():
        if precision.dtype == dtype:
            return precision
    raise ValueError(f"no precision has dtype {dtype}; known are {', '.join(PRECISIONS)}")
