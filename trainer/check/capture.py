"""The capture of a run for comparison: activations, gradients, parameters, by common names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from holdfast.parallel.layout import ParameterSpec


@dataclass(frozen=True, slots=True)
class CapturedBox:
    """A box of a logical tensor as one rank has it."""

    name: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    shape: tuple[int, ...]
    """The shape of the whole logical tensor."""
    copies: tuple[int, ...]
    """Shard indices that hold the same box."""
    values: Tensor


@dataclass(slots=True)
class RankCapture:
    """The capture of one rank. Activations and gradients are those of the first step."""

    place: Mapping[str, int] = field(default_factory=dict)
    """The rank's index along each axis; empty for the reference."""
    shard: int = 0
    """Its shard index."""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    outputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(module, micro-batch) -> its output, float64[seq (/ tensor), micro_batch, hidden]."""
    output_gradients: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    partial_gradients: list[CapturedBox] = field(default_factory=list)
    """This rank's sums before any reduction, by segment."""
    gradients: list[CapturedBox] = field(default_factory=list)
    """The reduced gradients of the blocks that this rank owns."""
    parameters: list[CapturedBox] = field(default_factory=list)
    """All parameters of this rank after the last step."""


def captured_box(
    spec: ParameterSpec, values: Tensor, rows: tuple[int, int] | None = None
) -> CapturedBox:
    """The box of a segment, or of some of its rows, with its values."""
    first, last = rows if rows is not None else (0, spec.rows)
    start = (spec.box.start[0] + first, *spec.box.start[1:])
    stop = (spec.box.start[0] + last, *spec.box.stop[1:])
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    copied = values.detach().cpu().double().reshape(shape).clone()
    return CapturedBox(spec.name, start, stop, spec.shape, spec.copies, copied)


class ActivationRecorder:
    """Records every module of a chunk whose output is a hidden state. Local."""

    def __init__(self, capture: RankCapture, current_micro_batch: Callable[[], int]) -> None:
        self._capture = capture
        self._current = current_micro_batch
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self, name: str, module: nn.Module, hidden: int) -> None:
        """Record an output of shape float[rows, batch, hidden], and its gradient, as `name`."""

        def forward_hook(_: nn.Module, __: object, output: object) -> None:
            if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[-1] != hidden:
                return
            key = (name, self._current())
            if key in self._capture.outputs:
                return  # a recomputed forward pass
            self._capture.outputs[key] = output.detach().clone()
            if output.requires_grad:
                output.register_hook(lambda gradient: self._keep_gradient(key, gradient))

        self._handles.append(module.register_forward_hook(forward_hook))

    def _keep_gradient(self, key: tuple[str, int], gradient: Tensor) -> None:
        self._capture.output_gradients[key] = gradient.detach().clone()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def watch_chunk(recorder: ActivationRecorder, chunk: nn.Module, hidden: int) -> None:
    """Watch all modules of a chunk under names that do not depend on the layout."""
    for name, module in chunk.named_modules():
        if name:
            shown = name.removeprefix("layers.").replace("block_", "block.")
            recorder.watch(shown, module, hidden)
