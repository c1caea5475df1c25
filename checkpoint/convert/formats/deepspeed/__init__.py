"""DeepSpeed: ZeRO folders, tensor parallelism, universal checkpoints.

May import checkpoint.convert, checkpoint.format, checkpoint.stores, parallel.errors,
parallel.optimizer and parallel.reading.
"""
