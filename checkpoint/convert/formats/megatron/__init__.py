"""Megatron-LM and Megatron-Core: torch_dist, legacy folders, models and places.

May import as formats.
"""
