"""One training run: its configuration, model, data, step loop and what it reports.

May import `holdfast.parallel`, `holdfast.checkpoint`, `holdfast.elastic` and `holdfast._native`.
"""
