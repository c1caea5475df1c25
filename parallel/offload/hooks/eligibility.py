"""Eligibility: which saved tensors may leave memory at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DEVICES = ("cpu", "cuda")
_KERNEL_ALIGNMENT = 64
"""torch's alignment in bytes. Restored tensors have it too, so kernels round alike."""


def movable_storage(tensor: Tensor, smallest_bytes: int) -> torch.UntypedStorage | None:
    """The storage of a saved tensor; None where it must stay in memory.

    These stay: leaves that require gradients and views of them, which belong to the user; tensors
    that are more than their storage (sparse, quantized, conjugated, of a subclass); storages below
    `smallest_bytes`.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if tensor.device.type not in _DEVICES:
        return None
    storage = tensor.untyped_storage()  # small ones are the most, and are told apart first
    if storage.nbytes() < smallest_bytes or storage.data_ptr() % _KERNEL_ALIGNMENT:
        return None
    base = tensor if tensor._base is None else tensor._base
    if base.is_leaf and base.requires_grad:
        return None
    if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        return None
    return storage
