"""The kinds of a checkpoint's tensors, and the names that they give. Pure; needs no torch.

Kinds of optimizer states are not listed here: a run has the kinds of its rule
(parallel/optimizer/registry.py), another program the kinds that it saved.
"""

from __future__ import annotations

WEIGHT = "weight"
"""The kind of trained parameters."""
BUFFER = "buffer"
"""The kind of a module's tensors beside its parameters."""
TENSOR = "tensor"
"""The kind of tensors that a program saved outside a module or an optimizer."""
STEP = "step"
"""The kind of a parameter's count of updates, which torch's optimizers keep."""
UNPREFIXED_KINDS = (WEIGHT, BUFFER, TENSOR)
"""The kinds of tensors under their own names; others have the kind before the weight's name."""


def full_name(kind: str, name: str) -> str:
    """The name of a tensor in a checkpoint: `exp_avg.lm_head.weight`.

    Args:
        name: the name of its weight, or the tensor's own.
    """
    return name if kind in UNPREFIXED_KINDS else f"{kind}.{name}"


def base_name(kind: str, full: str) -> str:
    """The name without the addition of its kind."""
    return full if kind in UNPREFIXED_KINDS else full.removeprefix(f"{kind}.")
