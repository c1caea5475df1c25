"""DeepSpeed: ZeRO folders, tensor parallelism, universal checkpoints.

May import checkpoint.convert, checkpoint.format, parallel.errors, parallel.optimizer and
parallel.reading.
"""
