"""Gradients and parameters that the replicas of a stage share: contributions to sums, and layers
whose parameters are in memory only while they are used.

May import parallel.comm, parallel.errors, parallel.optimizer.accumulator,
parallel.optimizer.exchange, parallel.optimizer.parameter_buffer, parallel.optimizer.spans,
parallel.plan and parallel.schedules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
