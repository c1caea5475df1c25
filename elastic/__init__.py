"""Membership, detection and recovery. May import `holdfast.parallel` and `holdfast._native`."""
