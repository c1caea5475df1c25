"""DeepSpeed: ZeRO folders, tensor parallelism, universal checkpoints.

May import as formats.
"""
