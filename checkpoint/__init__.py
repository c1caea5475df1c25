"""Saving and loading state in any layout. May import `holdfast.parallel` and `holdfast._native`.

Empty until issue 3.
"""
