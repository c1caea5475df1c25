"""Membership, detection and recovery. May import `holdfast.parallel` and `holdfast._native`.

Empty until issue 4.
"""
