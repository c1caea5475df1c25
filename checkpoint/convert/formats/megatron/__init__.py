"""Megatron-LM and Megatron-Core: torch_dist, legacy folders, models, the order of optimizer states.

May import checkpoint.convert, checkpoint.format, checkpoint.model_config, checkpoint.stores,
parallel.errors, parallel.optimizer and parallel.reading.
"""
