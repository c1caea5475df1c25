"""DeepSpeed: ZeRO folders, tensor parallelism, universal checkpoints.

May import checkpoint.convert, checkpoint.format, checkpoint.stores and parallel.errors.
"""
