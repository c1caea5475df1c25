"""The subcommands of `holdfast`, one module a group.

May import everything below launch.
"""
