"""What is computed with gradients and their integer sums, by code for each kind of device.

The bits are the same: native kernels on CPU, Triton's kernels on CUDA devices, and torch's
operations where Triton does not work. Triton is imported when a CUDA device needs it. May import
_native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
