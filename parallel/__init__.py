"""How a step is computed by many ranks, with the same bits whatever the layout.

Layout algebra, mesh, plan, schedules and their executor, tensor and data parallelism, the sharded
optimizer, keyed random numbers and communicators. May import _native.
"""
