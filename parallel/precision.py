"""Precisions of training: the element types of parameters and of the optimizer's state.

This is their only table: element sizes, names in files and torch's dtypes come from it, and its
keys are the allowed values of `train.precision`. Importing it needs no torch.
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
    """The name in configurations: "bf16"."""
    torch_name: str
    """The name of torch's dtype, also used in a Hugging Face config.json: "bfloat16"."""
    stored: str
    """The name of the element type in safetensors: "BF16"."""
    bytes: int
    """The bytes of one element."""
    state_name: str
    """The name of the precision of the optimizer's state, and of gradients in fast mode."""

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
        """Whether the optimizer keeps and updates a copy of the parameters with more bits."""
        return self.state_name != self.name


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", "F32", 4, state_name="fp32"),
        Precision("bf16", "bfloat16", "BF16", 2, state_name="fp32"),
        Precision("fp64", "float64", "F64", 8, state_name="fp64"),
    )
}
"""The precisions by the value of `train.precision`."""


def precision_of(dtype: torch.dtype) -> Precision:
    """The precision with this dtype of parameters.

    Raises:
        ValueError: no precision has the dtype; the message lists those that exist.
    """
    for precision in PRECISIONS.values():
        if precision.dtype == dtype:
            return precision
    raise ValueError(f"no precision has dtype {dtype}; known are {', '.join(PRECISIONS)}")
