"""How a run exchanges gradients and parameters: the constants of the exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.exchange.wire import PackedWire, PlainWire, Wire


@dataclass(frozen=True, slots=True)
class ExchangeSettings:
    """The choices of a run; none changes a bit but `reduce_dtype`."""

    overlap: bool = True
    """Whether messages travel beside computation."""
    bucket_elements: int = 1 << 20
    """The size up to which neighbouring blocks travel as one message: long enough for a link, short
    enough that a receiver adds one bucket while the next one arrives."""
    packing: bool = True
    """Whether integer sums are packed on the wire."""
    reduce_dtype: torch.dtype | None = None
    """The dtype of float sums on the wire; None: that of the sums. Fast mode only."""


def wire_of(
    accumulator: GradientAccumulator, settings: ExchangeSettings, comm: Communicator
) -> Wire:
    """The form of an accumulator's sums on a transport."""
    sums = accumulator.sums
    if accumulator.exact:
        packs = settings.packing and comm.carries_short_messages
        return PackedWire(sums.device) if packs else PlainWire(sums.dtype, sums.device)
    return PlainWire(settings.reduce_dtype or sums.dtype, sums.device)
