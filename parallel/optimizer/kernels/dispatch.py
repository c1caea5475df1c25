"""Which code works on the sums of a device."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch

from holdfast.parallel.optimizer.kernels.operations import SumOperations

OLDEST_CAPABILITY = (7, 0)
"""The oldest CUDA devices that Triton makes code for."""

_log = logging.getLogger(__name__)


def operations_of(device: torch.device) -> SumOperations:
    """The code for `device`: native on CPU, Triton's on CUDA, else torch's operations. Local."""
    if device.type == "cpu":
        from holdfast.parallel.optimizer.kernels import native_operations

        return native_operations
    if device.type == "cuda" and _triton_works(device):
        from holdfast.parallel.optimizer.kernels import triton_sums

        return triton_sums
    from holdfast.parallel.optimizer.kernels import torch_operations

    return torch_operations


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether a kernel runs on `device`: Triton also needs a C compiler when it first runs."""
    if find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return False
    try:
        from holdfast.parallel.optimizer.kernels import triton_sums

        one = torch.ones(1, dtype=torch.int64, device=device)
        triton_sums.add_integers(one, one.clone())
        return int(one) == 2
    except Exception as error:  # whatever its compiler or its launcher raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        _log.warning(
            "Triton does not work on %s (%s): torch's operations add up gradients, with the same "
            "bits and several times the memory traffic",
            device,
            reason,
        )
        return False
