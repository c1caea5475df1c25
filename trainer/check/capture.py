"""The capture of a run for comparison: activations, gradients, parameters, by common names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """The parts that have the same box."""
    values: Tensor


@dataclass(slots=True)
class RankCapture:
    """The capture of one rank. Activations and gradients are those of the first step."""

    place: Mapping[str, int] = field(default_factory=dict)
    """The rank's index along each axis; empty for the reference."""
    parts: tuple[int, ...] = (0,)
    """The parts of the parameters that it holds."""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    slices: int = 1
    """The slices of a sequence."""
    outputs: dict[tuple[str, int], dict[int, Tensor]] = field(default_factory=dict)
    """(module, micro-batch) -> by slice, its output: float64[tokens (/ tensor), micro_batch,
    hidden]."""
    output_gradients: dict[tuple[str, int], dict[int, Tensor]] = field(default_factory=dict)
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

    def __init__(
        self, capture: RankCapture, current_micro_batch: Callable[[], int], own: Sequence[int]
    ) -> None:
        """Nothing is watched yet.

        Args:
            own: the slices that the rank computes, in the order in which it does.
        """
        self._capture, self._own = capture, own
        self._current = current_micro_batch
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self, name: str, module: nn.Module, hidden: int) -> None:
        """Record outputs of shape float[rows, batch, hidden], and their gradients, as `name`."""

        def forward_hook(_: nn.Module, __: object, output: object) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # a backward pass computes it again
            for one in output if isinstance(output, list) else [output]:
                if isinstance(one, Tensor) and one.ndim == 3 and one.shape[-1] == hidden:
                    self._keep(name, one)

        self._handles.append(module.register_forward_hook(forward_hook))

    def _keep(self, name: str, output: Tensor) -> None:
        key = (name, self._current())
        found = self._capture.outputs.setdefault(key, {})
        number = self._own[len(found)]
        found[number] = output.detach().clone()

        def keep_gradient(gradient: Tensor) -> None:
            of_slices = self._capture.output_gradients.setdefault(key, {})
            of_slices[number] = gradient.detach().clone()

        if output.requires_grad:
            output.register_hook(keep_gradient)

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
