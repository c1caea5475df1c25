"""Membership, detection and recovery. May import parallel."""
