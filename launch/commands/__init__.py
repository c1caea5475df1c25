"""The subcommands of `holdfast`, one module a group.

May import launch, trainer, checkpoint, elastic and parallel.
"""
