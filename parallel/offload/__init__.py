"""Activations that wait on an SSD, or in host memory, for their backward pass."""

from holdfast.parallel.offload.amount import Amount, Bounds, drive_life_years
from holdfast.parallel.offload.offloader import Offloader
from holdfast.parallel.offload.report import OffloadReport

__all__ = ["Amount", "Bounds", "OffloadReport", "Offloader", "drive_life_years"]
