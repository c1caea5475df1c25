"""Membership of a run: agreement on generations, detection of losses and hangs, faults.

May import parallel.
"""
