"""The computation of a step by many ranks, with the same bits whatever the layout.

It has the layout algebra, mesh, plan, schedules and their executor, tensor and data parallelism,
the sharded optimizer, keyed random numbers and communicators. May import _native.
"""
