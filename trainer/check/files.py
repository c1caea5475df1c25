"""A rank's capture as a safetensors file, which ranks can hand over without pickling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast.trainer.check.capture import CapturedBox, RankCapture

_PIECES = ("partial_gradients", "gradients", "parameters")
_ACTIVATIONS = ("outputs", "output_gradients")


def save_capture(capture: RankCapture, path: Path) -> None:
    """Write a capture."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {
        "place": dict(capture.place),
        "parts": capture.parts,
        "slices": capture.slices,
        "losses": [value.hex() for value in capture.losses],
        "grad_norms": [value.hex() for value in capture.grad_norms],
    }
    for kind in _ACTIVATIONS:
        entries = [
            (*key, number, value)
            for key, of_slices in getattr(capture, kind).items()
            for number, value in of_slices.items()
        ]
        index[kind] = [entry[:-1] for entry in entries]
        tensors |= {f"{kind}.{n}": entry[-1].contiguous() for n, entry in enumerate(entries)}
    for kind in _PIECES:
        pieces: list[CapturedBox] = getattr(capture, kind)
        index[kind] = [[p.name, p.start, p.stop, p.shape, p.copies] for p in pieces]
        tensors |= {f"{kind}.{n}": piece.values.contiguous() for n, piece in enumerate(pieces)}
    save_file(tensors, path, metadata={"index": json.dumps(index)})


def load_capture(path: Path) -> RankCapture:
    """Read the capture that `save_capture` wrote."""
    with safe_open(path, framework="pt") as file:
        index = json.loads(file.metadata()["index"])
        capture = RankCapture(index["place"], tuple(index["parts"]), slices=index["slices"])
        capture.losses = [float.fromhex(value) for value in index["losses"]]
        capture.grad_norms = [float.fromhex(value) for value in index["grad_norms"]]
        for kind in _ACTIVATIONS:
            values = getattr(capture, kind)
            for number, (name, micro_batch, of_slice) in enumerate(index[kind]):
                found = values.setdefault((name, micro_batch), {})
                found[of_slice] = file.get_tensor(f"{kind}.{number}")
        for kind in _PIECES:
            pieces = getattr(capture, kind)
            for number, (name, *bounds) in enumerate(index[kind]):
                start, stop, shape, copies = (tuple(bound) for bound in bounds)
                values = file.get_tensor(f"{kind}.{number}")
                pieces.append(CapturedBox(name, start, stop, shape, copies, values))
    return capture
