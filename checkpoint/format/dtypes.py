"""The element types by safetensors' names and by torch's."""

from __future__ import annotations

import torch

from holdfast.checkpoint.format.files import TORCH_NAMES

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
