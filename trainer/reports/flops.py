"""Model floating-point operations, and the peak rates for utilisation."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.parallel.layout import LayerSpec

PEAK_BF16_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bf16 rates from data sheets, by the beginning of the device's name."""


def step_flops(layers: Sequence[LayerSpec], micro_batches: int) -> float:
    """Operations of a step's forward and backward passes, without recomputation.

    That is three times the forward pass: 6 for each matrix parameter and token. Causal attention
    counts half its square.
    """
    return 3.0 * micro_batches * sum(layer.forward_flops for layer in layers)


def utilisation(flops: float, step_s: float, devices: int, device_name: str) -> float | None:
    """The model FLOPs utilisation in [0, 1]; None for a device without a known peak."""
    for name, peak in PEAK_BF16_FLOPS.items():
        if device_name.startswith(name):
            return flops / (step_s * devices * peak)
    return None
