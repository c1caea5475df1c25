"""Model families: their configuration, their parameter table and their modules.

config.py and specs.py need no torch, so that plans are made without it. May import `holdfast.parallel`.
"""
