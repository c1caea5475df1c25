"""One training run: its configuration, model, data, step loop and what it reports.

May import checkpoint, elastic, parallel and _native.
"""
