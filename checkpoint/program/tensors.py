"""One tensor of a program on one rank: its name, its box, and whether it can be saved at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import _native
from holdfast.checkpoint.format import DTYPE_NAMES
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

_LANES = 1 << 22
"""64-bit words of a tensor on a device that are summed at a time."""


@dataclass(frozen=True, slots=True)
class ProgramTensor:
    """One tensor of a program on this rank."""

    name: str
    kind: str
    key: str
    """The key of the state that it belongs to."""
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    box: Box
    """The box that this rank has; empty where it has no element."""
    local: Tensor
    own: bool = False
    """Whether each rank may have a value of its own: buffers, and tensors in plain values."""
    led: bool = False
    """Whether the first rank's value counts, as DistributedDataParallel's buffers."""

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.local.dtype]


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def check_tensor(value: Tensor, path: str) -> None:
    """Refuse a tensor whose bytes are not all of it.

    Raises:
        CheckpointError: it is on the meta device, sparse, of a class with other contents, or of a
            type that the tensor files lack.
    """
    kind = type(value)
    why = ""
    if kind.__name__ == "FlatParameter" or hasattr(value, "ds_id"):
        why = (
            "it is a rank's shard of several parameters, and no DTensor; use FSDP2 (fully_shard), "
            "or give what FSDP.state_dict(model, ...) collects"
        )
    elif getattr(value, "tensor_model_parallel", False) and not is_dtensor(value):
        why = "it is a shard of tensor parallelism, and no DTensor; make it a DTensor"
    elif value.layout != torch.strided:
        why = f"it is sparse ({value.layout}); save its indices and values, or to_dense()"
    elif value.is_quantized:
        why = f"it is quantized ({value.dtype}); save its int_repr(), scale and zero point"
    elif value.is_nested:
        why = "it is a nested tensor; save its values and offsets"
    elif nn.parameter.is_lazy(value):
        why = "it has no shape yet; run the module once first"
    elif not is_dtensor(value) and _has_other_contents(kind):
        why = f"it is a {kind.__module__}.{kind.__qualname__}, whose contents are not its elements"
    elif value.device.type == "meta" or (is_dtensor(value) and _local(value).is_meta):
        why = "it is on the meta device and has no values; call to_empty and initialize it first"
    elif value.dtype not in DTYPE_NAMES:
        why = f"its type {value.dtype} is none that safetensors files can hold"
    if why:
        raise CheckpointError(f"{path} cannot be saved or loaded: {why}")


def _has_other_contents(kind: type[Tensor]) -> bool:
    plain = (Tensor.__torch_dispatch__, nn.Parameter.__torch_dispatch__)
    return kind not in (Tensor, nn.Parameter, nn.Buffer) and kind.__torch_dispatch__ not in plain


def _local(value: Any) -> Tensor:
    return value.to_local()


def local_part(value: Tensor, path: str) -> tuple[Tensor, Box]:
    """This rank's part of a tensor: its values, and the box that they fill.

    Raises:
        CheckpointError: the local part of a DTensor is not a box, or is a partial sum.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    value = value.detach()
    if not isinstance(value, DTensor):
        return value, Box.whole(value.shape)
    for placement in value.placements:
        if isinstance(placement, Partial):
            raise CheckpointError(f"{path} is a partial sum; redistribute it before saving")
        if type(placement) not in (Replicate, Shard) and not hasattr(placement, "split_factor"):
            raise CheckpointError(
                f"{path} is placed as {placement}, whose local part is not one box of the tensor"
            )
    mesh: Any = value.device_mesh
    local, box = value.to_local(), _box_of(value.shape, mesh, value.placements)
    if box is None or (box.elements and tuple(local.shape) != box.shape):
        raise CheckpointError(
            f"{path} is placed as {value.placements}, whose local part is not one box of the tensor"
        )
    return local if box.elements else local.new_empty(box.shape), box


@lru_cache(maxsize=65536)
def _box_of(shape: torch.Size, mesh: Any, placements: tuple[Any, ...]) -> Box | None:
    """This rank's box of a DTensor with this shape, mesh and placements; None if it is no box.

    It is empty on ranks outside of the mesh.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Box((0,) * len(shape), (0,) * len(shape))
    held = [[(0, extent)] for extent in shape]
    for place, count, placement in zip(coordinate, mesh.shape, placements, strict=True):
        if hasattr(placement, "dim"):
            parts = getattr(placement, "split_factor", 1)
            held[placement.dim] = _joined(
                run
                for part in range(parts)
                for run in _cut(_cut(held[placement.dim], parts, part), count, place)
            )
    if any(len(runs) > 1 for runs in held):
        return None
    ends = [runs[0] if runs else (0, 0) for runs in held]
    return Box(tuple(start for start, _ in ends), tuple(stop for _, stop in ends))


def _cut(runs: list[tuple[int, int]], count: int, index: int) -> list[tuple[int, int]]:
    """Part `index` of `count` of the indices in runs of (start, stop), as torch.chunk cuts them."""
    size = sum(stop - start for start, stop in runs)
    width = -(-size // count)
    first, last = min(width * index, size), min(width * (index + 1), size)
    found = []
    for start, stop in runs:
        begin, end = start + max(first, 0), min(stop, start + last)
        if begin < end:
            found.append((begin, end))
        first, last = first - (stop - start), last - (stop - start)
    return found


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of (start, stop) with those that touch each other joined."""
    found: list[tuple[int, int]] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


def program_tensor(
    value: Tensor,
    name: str,
    kind: str,
    key: str,
    path: str,
    *,
    own: bool = False,
    led: bool = False,
) -> ProgramTensor:
    """A tensor of this rank under a name.

    Raises:
        CheckpointError: the tensor cannot be saved; it is named by its path.
    """
    check_tensor(value, path)
    local, box = local_part(value, path)
    return ProgramTensor(
        name, kind, key, tuple(value.shape), box, local, own and not is_dtensor(value), led
    )


def fingerprint(local: Tensor) -> int:
    """A checksum of a tensor's bytes; on a GPU it is computed there."""
    values = local.detach().resolve_conj().resolve_neg().contiguous()
    raw = values.view(-1).view(torch.uint8)
    if raw.device.type == "cpu":
        return _native.crc32c(raw.data_ptr(), raw.numel(), 0) if raw.numel() else 0
    return device_fingerprint(raw)


def device_fingerprint(raw: Tensor) -> int:
    """A checksum of bytes (uint8[bytes]) that depends on their order, computed where they are."""
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()
    whole = raw.numel() // 8 * 8
    words = raw[:whole].view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for part in (*words.split(_LANES), raw[whole:].to(torch.int64)):
        factors = torch.arange(1, 2 * part.numel(), 2, device=raw.device)
        total = total * 0x5DEECE66D + (part * factors).sum()
    return int(total)


def device_of(doc: Mapping[str, Any], home: torch.device | None = None) -> torch.device:
    """The device of a tensor that is loaded: as it was saved if this machine has that.

    Args:
        home: the device where such a tensor is expected; None: the host.
    """
    home = home or torch.device("cpu")
    kind = doc.get("device", home.type)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    has = kind == "cpu" or (found is not None and found.type == kind)
    return torch.device(kind) if has and kind != home.type else home


def completed(made: Tensor, doc: Mapping[str, Any]) -> Tensor:
    """A tensor that was made for one of a value, with the attributes that this one had."""
    if doc.get("parameter"):
        return nn.Parameter(made, requires_grad=bool(doc.get("grad")))
    return made.requires_grad_() if doc.get("grad") else made


def replicated(values: Tensor, parameter: Any) -> Tensor:
    """A DTensor with all values on each rank of a parameter's mesh."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
