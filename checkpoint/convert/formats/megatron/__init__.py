"""Megatron-LM and Megatron-Core: torch_dist, legacy folders, models, the order of optimizer states.

May import checkpoint.convert, checkpoint.stores and parallel.errors.
"""
