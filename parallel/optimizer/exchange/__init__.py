"""The exchange of gradient sums and updated parameters between ranks, beside computation.

May import parallel.comm, parallel.errors, parallel.layout, parallel.optimizer.accumulator,
parallel.optimizer.flat_values, parallel.optimizer.kernels, parallel.optimizer.packing,
parallel.optimizer.parameter_buffer, parallel.optimizer.spans and parallel.plan.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
